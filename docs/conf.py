"""The settings of the documentation, which `make docs` builds without a network."""

from formats import __version__

project = "int4-convert"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
exclude_patterns = ["_*"]

default_role = "py:obj"  # `name` in a docstring is code, and a link where it names something of these pages
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = f"int4-convert {release}"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_theme_options = {"navigation_with_keys": False, "show_prev_next": False}
