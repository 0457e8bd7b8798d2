"""The site: `make docs` builds it into build/docs, with warnings as errors. No page asks anything of the network."""

from __future__ import annotations

import sys
from pathlib import Path

import dpt_hpc

sys.path.insert(0, str(Path(__file__).parent))

project = "dpt_hpc"
author = "dpt_hpc developers"
project_copyright = f"2026, {author}"
version = release = dpt_hpc.__version__

# The last four lie beside this file.
extensions = ["myst_parser", "sphinx.ext.autodoc", "accessible", "mathml", "plain_docstrings", "reference"]
exclude_patterns = ["README.md"]
default_role = "code"
# They would make a dash of the two hyphens of an option.
smartquotes = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Pages that are included (README, CONTRIBUTING, launch/README) link to files of the repository.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"dpt_hpc {release}"
html_copy_source = False
html_show_sourcelink = False
# Contrast of at least 4.5 to 1, in light and in dark.
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
