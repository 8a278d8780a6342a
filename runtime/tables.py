"""The figures of an evaluation, as people and as programs read them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from runtime.evaluate import Evaluation, Measurement
from runtime.integrations.lm_eval import Score


def as_json(result: Evaluation, protocol: dict[str, Any]) -> dict[str, Any]:
    """The figures as they stand in `--json`: the model's own at the top, beside them what compares."""
    fields = dataclasses.asdict(result)
    return {**fields.pop("model"), **{key: value for key, value in fields.items() if value is not None}, **protocol}


def table(result: Evaluation, protocol: dict[str, Any]) -> str:
    """The figures of a text, in a column for each model."""
    columns = [("int4", result.model)]
    if result.reference is not None:
        columns.append(("reference", result.reference))
    lines = [
        f"{protocol['windows']} windows of {protocol['seq_len']} tokens, {_conditions(protocol)}",
        f"{'':24}" + "".join(f"{title:>14}" for title, _ in columns),
    ]
    cells = [_cells(measurement) for _, measurement in columns]
    lines += [f"{label:24}" + "".join(f"{cell[label]:>14}" for cell in cells) for label in cells[0]]
    if result.increase is not None and result.kld is not None and result.same_top1 is not None:
        lines += [
            f"perplexity increase     {result.increase:>+14.2%}{_plus_minus(result.increase_se, '.2%')}",
            f"KL divergence, nats     {result.kld.mean:>14.4f}  mean{_plus_minus(result.kld.mean_se, '.4f')}",
            f"{'':24}{result.kld.median:>14.4f}  median",
            f"{'':24}{result.kld.p999:>14.4f}  99.9 %",
            f"same first choice       {result.same_top1:>14.2%}",
        ]
    return "\n".join(lines)


def task_table(model: Sequence[Score], reference: Sequence[Score] | None) -> str:
    """The figures of tasks, each with its standard error, in a column for each model."""
    columns = [model] if reference is None else [model, reference]
    heading = ("task", "metric", *("int4", "reference")[: len(columns)])
    rows = [heading]
    for figures in zip(*columns, strict=True):
        values = (f"{one.value:.4f}{_plus_minus(one.stderr, '.4f'):{len(' ± 0.0000')}}" for one in figures)
        rows.append((figures[0].task, figures[0].metric, *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{task:{widths[0]}}  {metric:{widths[1]}}"
        + "".join(f"  {value:>{width}}" for value, width in zip(values, widths[2:], strict=True)).rstrip()
        for task, metric, *values in rows
    )


def _conditions(protocol: dict[str, Any]) -> str:
    """What the int4 model computed in, where, and with which options that change its numbers or speed."""
    parts = [protocol["dtype"], protocol["device"]]
    if protocol["activations"] is not None:
        parts.append(f"{protocol['activations']} activations")
    if protocol.get("join") is False:
        parts.append("layers not joined")
    return ", ".join(parts)


def _plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"


def _cells(measurement: Measurement) -> dict[str, str]:
    peak = measurement.peak_memory_bytes
    return {
        "perplexity": f"{measurement.perplexity:.3f}",
        "tokens/s": f"{measurement.tokens_per_second:,.0f}",
        "weights, MB": f"{measurement.weight_bytes / 1e6:,.1f}",
        "peak memory, MB": "on GPU only" if peak is None else f"{peak / 1e6:,.1f}",
    }
