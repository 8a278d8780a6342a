"""From a Hugging Face checkpoint to an int4 checkpoint, streamed tensor by tensor."""
