"""The demo: one image in the browser, without and with adapting to it."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from tttlab.config.params import Params
from tttlab.config.values import BENCHMARK, HELD_OUT, SEVERITIES
from tttlab.errors import UserError, pipeline_extra
from tttlab.evaluation.results import shift_name
from tttlab.serving.adaptive_model import AdaptiveModel
from tttlab.serving.answers import Wish
from tttlab.serving.showing import show
from tttlab.workflow.demo import drawings, look
from tttlab.workflow.demo.material import Material, open_material
from tttlab.workflow.demo.scale import draw_scale
from tttlab.workflow.demo.steps import draw_steps
from tttlab.workflow.ui import find_port

MOST_STEPS = 10  # or what tuning chose, if that is more
NONE = "none"


def open_demo(params: Params, first: int) -> None:
    """Serve the page on this machine until Ctrl-C.

    Args:
        params: all settings.
        first: the first port to try.

    Raises:
        UserError: there is nothing to show, no free port, or Gradio is not installed.
    """
    port = find_port(first)
    with tempfile.TemporaryDirectory(prefix="ttt-lab-") as uploads:
        # Gradio reads these when it is imported: it tells nobody anything, and photos that are
        # brought along are gone when the demo ends.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        with pipeline_extra("demo"):
            import gradio  # noqa: F401
        serve(open_material(params), port)


def serve(material: Material, port: int) -> None:
    """Serve the page at a port of this machine until Ctrl-C."""
    import uvicorn

    app = make_app(material)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # photos are deleted then, too
    print(f"demo        http://127.0.0.1:{port}/      Ctrl-C ends it", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def make_app(material: Material) -> Any:
    """Make the web application around the page; nothing in it asks another host."""
    import gradio as gr
    from fastapi import FastAPI, Request

    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def forbid_other_hosts(request: Request, proceed: Any) -> Any:
        response = await proceed(request)
        response.headers["Content-Security-Policy"] = look.POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return gr.mount_gradio_app(
        app,
        Page(material).blocks,
        path="/",
        theme=gr.themes.Base(primary_hue="blue", **look.FONTS),
        css=look.CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=material.limits.megabytes * 10**6,
    )


class Page:
    """The page's controls, and what each of them does.

    Attributes:
        blocks: the page, for Gradio.
    """

    def __init__(self, material: Material) -> None:
        import gradio as gr

        self.gr, self.material = gr, material
        self._known: tuple[Any, dict[str, Any]] = (None, {})  # of the last image
        self.first = next(iter(material.models))
        with gr.Blocks(
            title="Test-time training of one image", fill_width=True, analytics_enabled=False
        ) as self.blocks:
            self.answer = gr.HTML(elem_id="answer")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320):
                    self._add_image()
                    self._add_run(material.models[self.first])
                    self._add_photo(material.models[self.first])
                    self.scale = gr.HTML(elem_id="scale")
                    self.runs = gr.HTML(elem_id="runs")
                with gr.Column(scale=5, min_width=340):
                    self.bars = gr.HTML(elem_id="bars")
                    self.steps_drawn = gr.HTML(elem_id="steps-drawn")
                    with gr.Accordion("As numbers", open=False):
                        self.numbers = gr.JSON(show_label=False)
            self._connect()

    def _add_image(self) -> None:
        gr, count = self.gr, len(self.material.test)
        corruptions = [(shift_name(name), name) for name in (*BENCHMARK, *HELD_OUT)]
        with gr.Group():
            self.number = gr.Slider(
                1,
                count,
                value=1,
                step=1,
                precision=0,
                label="Test image",
                elem_id="number",
                buttons=[],
            )
            with gr.Row():
                self.corruption = gr.Dropdown(
                    [(NONE, NONE), *corruptions],
                    value="fog",
                    label="Corruption",
                    scale=3,
                    min_width=140,
                    elem_id="corruption",
                )
                self.severity = gr.Slider(
                    SEVERITIES[0],
                    SEVERITIES[-1],
                    value=3,
                    step=1,
                    precision=0,
                    scale=4,
                    min_width=150,
                    label="Severity",
                    elem_id="severity",
                    buttons=[],
                )

    def _add_run(self, chosen: AdaptiveModel) -> None:
        gr, models = self.gr, list(self.material.models)
        with gr.Group():
            self.model = gr.Dropdown(
                models, value=self.first, label="Network", elem_id="model", visible=len(models) > 1
            )
            self.run = gr.Dropdown(
                drawings.run_choices(chosen), value=chosen.best, label="Run", elem_id="run"
            )
            with gr.Row():
                self.steps = gr.Slider(
                    label="Steps", scale=4, **self._steps(self.first, chosen.best)
                )
                self.gate = gr.Checkbox(True, label="Gate", scale=1, min_width=90, elem_id="gate")

    def _add_photo(self, chosen: AdaptiveModel) -> None:
        gr = self.gr
        with gr.Accordion("A photo of your own", open=False):
            self.classes = gr.HTML(drawings.tell_classes(chosen.classes))
            self.photo = gr.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard", "webcam"],
                show_label=False,
                height=180,
                elem_id="photo",
                buttons=[],
            )
            # Gradio would open the file first, and tell what is wrong with it in many lines.
            self.photo.preprocess = lambda file: file.path if file else None

    def _steps(self, model: str, run: str) -> dict[str, Any]:
        """Give the slider of steps for a run: how many tuning chose, or none."""
        served = self.material.models[model].runs[run]
        chosen, trains = served.task.loop.steps, served.takes_steps
        most = max(MOST_STEPS, chosen)
        return {
            "minimum": 0,
            "maximum": most,
            "value": chosen if trains else 0,
            "step": 1,
            "precision": 0,
            "interactive": trains,
            "elem_id": "steps",
            "buttons": [],
        }

    def _connect(self) -> None:
        """Say what happens when something is touched; the last wish counts."""
        shown = {
            "fn": self.show,
            "inputs": [
                *(self.number, self.photo, self.corruption, self.severity),
                *(self.model, self.run, self.steps, self.gate),
            ],
            "outputs": [
                *(self.answer, self.bars, self.steps_drawn),
                *(self.scale, self.runs, self.numbers),
            ],
            "show_progress": "hidden",
            "concurrency_id": "adapt",
            "concurrency_limit": 1,
        }
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        asked = [self.corruption, self.severity, self.steps, self.gate]
        self.gr.on(
            [self.blocks.load, *(control.input for control in asked), self.photo.change],
            api_name="show",
            trigger_mode="always_last",
            **shown,
        )
        # A test image takes the place of a photo.
        self.number.input(lambda: None, None, self.photo, **hidden).then(
            api_visibility="private", **shown
        )
        self.model.input(
            self.choose_model, self.model, [self.run, self.steps, self.classes], **hidden
        ).then(api_visibility="private", **shown)
        self.run.input(self.choose_run, [self.model, self.run], self.steps, **hidden).then(
            api_visibility="private", **shown
        )

    def choose_model(self, model: str) -> tuple[Any, Any, str]:
        """Offer the runs of another model, its best one first."""
        chosen = self.material.models[model]
        run = self.gr.Dropdown(drawings.run_choices(chosen), value=chosen.best)
        return run, self.choose_run(model, chosen.best), drawings.tell_classes(chosen.classes)

    def choose_run(self, model: str, run: str) -> Any:
        """Set the steps to what tuning chose for a run."""
        return self.gr.Slider(**self._steps(model, run))

    def show(
        self,
        number: int,
        photo: str | None,
        corruption: str,
        severity: int,
        model: str,
        run: str,
        steps: int,
        gate: bool,
    ) -> tuple[str, str, str, str, str, dict[str, Any]]:
        """Draw everything anew.

        Args:
            number: of a test image, from 1 on; a photo takes its place.
            photo: an image file, or None.
            corruption: what to do to it first, or ``none``.
            severity: of the corruption, 1 to 5.
            model: a model's name.
            run: a run's name.
            steps: that the run takes; has no effect on a run that takes none.
            gate: whether runs follow their gates.

        Returns:
            the answer, the bars, the steps, the scale and the runs as HTML, and all numbers.
        """
        material, chosen = self.material, self.material.models[model]
        corruption = None if corruption == NONE else corruption
        try:
            picture = material.own(Path(photo), model) if photo else material.picture(number)
            trains = chosen.find(run)[1].takes_steps
            wish = Wish(run, gate, int(steps) if trains else None)
            image = model, picture.key, corruption, int(severity), gate
            if self._known[0] != image:
                self._known = image, {}
            shown = show(chosen, picture, corruption, int(severity), wish, self._known[1])
        except UserError as error:
            raise self.gr.Error(str(error), print_exception=False) from error
        shift = drawings.shift_words(corruption, int(severity))
        measured = corruption and (shift, material.corrupted(model, corruption, int(severity)))
        scale = material.source[model], material.shifts[model], measured or None
        numbers = {"truth": shown.truth, "run": shown.run, **shown.says}
        numbers["runs"] = {
            name: {key: value for key, value in says.items() if key != "curve"}
            for name, says in shown.runs.items()
        }
        return (
            drawings.draw_answer(shown, shift),
            drawings.draw_bars(shown),
            draw_steps(shown),
            draw_scale(shown, *scale),
            drawings.draw_runs(shown, chosen),
            numbers,
        )
