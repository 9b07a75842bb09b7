"""Settings of the docs site: `make docs` builds it."""

import sys
from pathlib import Path

from pygments.lexers import JsonLexer, TextLexer
from sphinx.highlighting import lexers

from errata import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "errata"
author = copyright = "errata developers"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "from_package",
    "mathml",
    "offline",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the tests run every block

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
smartquotes_action = "D"  # -- is a dash outside of code; quotes stay as they are
default_role = "py:obj"  # `name` in a docstring is a link if the name is on the site, else code
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes in one list, described once

html_theme = "furo"
html_title = "errata"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"

lexers.update(csv=TextLexer(), output=TextLexer(), jsonl=JsonLexer())
