"""Serves a local web page: upload clips of a few classes and a query, and see which class it resembles and why.

    python run/app.py --checkpoint checkpoints/clipspm_demo/checkpoint_best.pt

Only this computer can open the page, unless --host names another address. Uploads are deleted when the command ends.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from run.start import start

    start()

from run.command import checkpoint, number, run_command
from utils.errors import UserError

if TYPE_CHECKING:
    from fsar import Classifier

CLASSES = 5
MAX_SHOTS = 10
FIELD_HEIGHT = 135  # pixels; height of an empty clip field
DEMO = Path("data/demo/videos")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and serves the page until the command is stopped."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=checkpoint, required=True, metavar="FILE", help="the trained checkpoint")
    parser.add_argument("--cfg", metavar="FILE", help="config for a checkpoint without one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument(
        "--port", type=number(int, 1, 65535), default=7860, metavar="N", help="port (default: %(default)s)"
    )
    parser.add_argument(
        "--max-mb", type=number(int, 1), default=100, metavar="MB", help="largest upload (default: %(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=number(float, 1), default=60, metavar="S", help="longest clip (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there is one")
    options = parser.parse_args(arguments)
    gradio_module()
    import fsar

    classifier = fsar.Classifier(fsar.load(options.checkpoint, options.cfg), options.device)
    with tempfile.TemporaryDirectory(prefix="fsar_app_") as uploads:
        page = serve(classifier, Path(uploads), options.host, options.port, options.max_mb, options.max_seconds)
        print(f"open {page.local_url} in a browser; press Ctrl-C to stop", flush=True)
        try:
            wait_until_stopped()
        finally:
            page.close()
    return 0


def wait_until_stopped() -> None:
    """Waits for a signal, which raises StopRequested."""
    threading.Event().wait()


def gradio_module() -> ModuleType:
    """Imports gradio, without its usage statistics.

    Raises:
        UserError: it or matplotlib is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
        import matplotlib
    except ImportError as error:
        install = "pip install -r requirements-app.txt -r requirements-report.txt"
        raise UserError(f"run/app.py needs {error.name}; install it with: {install}") from error
    matplotlib.use("agg")
    return gradio


def serve(classifier: "Classifier", uploads: Path, host: str, port: int | None, max_mb: int, seconds: float) -> Any:
    """Starts the page in the background and returns it; `close()` stops it.

    Args:
        classifier: its `fit` is called for each request; requests are answered one at a time.
        uploads: folder for the uploaded clips.
        host, port: where to listen; the port None is any free one.
        max_mb: size limit of an upload in MB.
        seconds: longest clip that is accepted.

    Raises:
        UserError: the port is taken.
    """
    gr = gradio_module()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)

    def classify(query: str | None, *fields: Any) -> tuple[Any, ...]:
        try:
            ranking, frames, pairing = answer(classifier, query, fields[:CLASSES], fields[CLASSES:], seconds)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return ranking, frames, pairing, gr.Column(visible=pairing is not None)

    example = demo_example()
    with gr.Blocks(title="Few-shot action recognition", analytics_enabled=False) as page:
        gr.Markdown("# Few-shot action recognition\nAdd clips of two or more classes and one clip to classify.")
        with gr.Row():
            with gr.Column():
                names, clips = [], []
                for number in range(1, CLASSES + 1):
                    with gr.Row():
                        names.append(gr.Textbox(label=f"Class {number}", scale=1))
                        clips.append(gr.File(label="Clips", file_count="multiple", scale=2, height=FIELD_HEIGHT))
                fill = gr.Button("Fill in an example from the demo", visible=bool(example))
            with gr.Column():
                query = gr.File(label="Clip to classify", height=FIELD_HEIGHT)
                button = gr.Button("Classify", variant="primary")
                ranking = gr.Label(label="Ranking (probabilities)")
                # A label inside a plot would cover its first line.
                gr.Markdown("### Frames")
                frames = gr.Plot(label="Frames", show_label=False)
                with gr.Column() as alignment:  # hidden for a method that does not pair frames
                    gr.Markdown("### Alignment")
                    pairing = gr.Plot(label="Alignment", show_label=False)
        inputs = [query, *names, *clips]
        outputs = [ranking, frames, pairing, alignment]
        button.click(classify, inputs, outputs, api_name="classify", concurrency_limit=1)
        if example:
            fill.click(lambda: example, None, inputs, api_name="example")
    try:
        page.launch(
            server_name=host, server_port=port, max_file_size=f"{max_mb}mb", prevent_thread_lock=True, quiet=True,
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: the port is taken, or the address is not one of this computer; "
            "choose another with --port or --host"
        ) from error
    return page


def demo_example() -> list[Any] | None:
    """Returns query, names and clips of an example from the demo's videos, or None if the videos are missing."""
    folders = [folder for folder in sorted(DEMO.glob("*")) if len(list(folder.glob("*.mp4"))) > 1][:3]
    if len(folders) < 2:
        return None
    rest = CLASSES - len(folders)
    videos = [[str(path) for path in sorted(folder.glob("*.mp4"))] for folder in folders]
    return [videos[0][1], *(f.name for f in folders), *[""] * rest, *(v[:1] for v in videos), *[None] * rest]


def answer(
    classifier: "Classifier", query: str | None, names: Sequence[str], files: Sequence[Any], seconds: float
) -> tuple[dict[str, float], Any, Any]:
    """Returns the probability of each class, the frames, and the alignment (None if the method does not pair frames).

    Raises:
        UserError: a name is missing or repeated, or clips are missing, too many, too long or unreadable.
    """
    from episodes.preparation.names import prompt_of
    from run.reporting import figures

    support: dict[str, list[Any]] = {}
    for name, paths in zip((name.strip() for name in names), files, strict=True):
        if bool(name) != bool(paths) or name in support:
            raise UserError(f"class {name or '(unnamed)'!r}: expected a name, given once, and at least one clip")
        if paths:
            if len(paths) > MAX_SHOTS:
                raise UserError(f"class {name!r}: found {len(paths)} clips, at most {MAX_SHOTS} are allowed")
            support[name] = [read(classifier, path, seconds) for path in paths]
    if not query:
        raise UserError("expected a clip to classify, found none")
    clip = read(classifier, query, seconds)
    prediction = classifier.fit(support, {name: prompt_of(name) for name in support}).predict([clip])
    first, second = prediction.scores[0].topk(2).indices.tolist()
    chosen = [(prediction.classes[way], support[prediction.classes[way]][0]) for way in (first, second)]
    with figures.style():
        rows = [("query", clip, figures.BLUE), (*chosen[0], figures.GREEN), (*chosen[1], figures.RED)]
        strips = figures.strips([(figures.short(name), frames, colour) for name, frames, colour in rows])
        pairings = {
            name: (weights[0, 0, first].float().cpu().numpy(), weights[0, 0, second].float().cpu().numpy())
            for name, weights in classifier.explain(clip).pairings.items()
            if weights is not None
        }
        roles = ("best class", "second class")
        drawn = figures.alignment(pairings, clip, chosen[0], chosen[1], roles) if pairings else None
    for figure in (strips, drawn):
        if figure is not None:
            figure.set_facecolor("white")  # readable on a dark page
    return dict(zip(prediction.classes, prediction.probabilities[0].tolist(), strict=True)), strips, drawn


def read(classifier: "Classifier", path: str, seconds: float) -> Any:
    """Returns the frames of an uploaded clip, uint8 [T, h, w, 3].

    Raises:
        UserError: the clip is too long or unreadable.
    """
    import av

    try:
        with av.open(path) as container:
            length = None if container.duration is None else container.duration / av.time_base
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(path).name} is unreadable; expected a video file") from error
    if length is None:
        raise UserError(f"the length of {Path(path).name} is unknown; convert it, for example to .mp4")
    if length > seconds:
        raise UserError(f"{Path(path).name} lasts {length:.0f} s, at most {seconds:g} s are allowed (--max-seconds)")
    return classifier.read(path)


if __name__ == "__main__":
    run_command(main, "the uploads are deleted")
