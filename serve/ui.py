"""The web page: Gradio, mounted in the server's own application; nothing comes from the internet.

A click submits a job to the pool as any other client's, follows its events, and shows step,
preview and pictures as they come.

checked by  tests/http/test_ui.py, in a real browser
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fastapi import FastAPI

from ..engine.errors import MissingExtra
from .own_files import OwnFiles
from .served import Served


def mount(app: FastAPI, served: Served) -> None:
    """Put the page at `/` of the server. Raises MissingExtra when Gradio is not installed."""
    files = tempfile.TemporaryDirectory(prefix="sdengine-page-")
    home = Path(files.name)
    # Gradio reads both when it is imported: uploads stay in our folder, and nobody is called.
    os.environ["GRADIO_TEMP_DIR"] = str(home)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr

        from .ui_page import page
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"the page needs the package {error.name}", hint="pip install 'sdengine[ui]'"
        ) from None
    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    blocks = page(served, home)
    gr.mount_gradio_app(
        app, blocks, path="/", theme=theme, show_error=False, ssr_mode=False, footer_links=[],
        max_file_size=served.config.limits.body, run_history=False,
    )  # fmt: skip
    blocks.has_launched = True  # Gradio's own look at paths is off until then
    app.add_middleware(OwnFiles, home=home)
    app.state.page_files = files  # removed with the server
