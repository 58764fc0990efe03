"""The documentation site: `sphinx-build -W docs build/docs` runs every page, then open build/docs/index.html."""

import os

import jaxloss

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the pages' kernels

project, author, copyright = "jaxloss", "The jaxloss authors", "The jaxloss authors"
version = release = jaxloss.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
nitpicky = True  # a link that leads nowhere is an error
default_role = "code"  # docstrings are written in Markdown's quotes

html_theme = "sphinx_book_theme"
html_title, html_favicon = "jaxloss", "_static/favicon.svg"
html_theme_options = {"show_toc_level": 2, "use_fullscreen_button": False, "navbar_persistent": []}
html_context = {"default_mode": "auto"}  # dark where the reader's system is
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 120  # seconds a cell
nb_execution_raise_on_error = True
nb_ipywidgets_js: dict = {}  # none from a CDN
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables too
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes are in the docstrings
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype, napoleon_attr_annotations = False, False
