"""The page's parts: four tabs, each a function of Page and an endpoint of the API. Nothing of it comes from
elsewhere: no fonts, no scripts, no analytics."""

from pathlib import Path

import gradio as gr

from clap2diffusion.base.settings import GUIDANCE
from clap2diffusion.demo.own_data import plain
from clap2diffusion.demo.page import MOST_PICTURES, MOST_STEPS, Page, show
from clap2diffusion.demo.parts import CheckedBlocks, unread

HERE = Path(__file__).parent
TITLE = "Sound to picture"
LIVE_EVERY_S, LIVE_DRAWN = 0.25, 4  # a piece of sound; pictures that are asked for at once
QUIET = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # the tabs wait for each other


def theme() -> gr.themes.Base:
    """The system's own fonts: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", text_size="md",
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"),
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    ).set(body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
          block_border_width="1px", block_label_text_size="*text_sm",
          body_text_color_subdued="*neutral_600", input_placeholder_color="*neutral_500",
          input_placeholder_color_dark="*neutral_400", color_accent="*primary_700",
          button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
          button_primary_background_fill_dark="*primary_700",
          button_primary_background_fill_hover_dark="*primary_800",
          button_primary_text_color="white", slider_color="*primary_600")


def message_of(tab: str) -> gr.HTML:
    return line_of(f"{tab}-message", "message", ' class="note" role="alert"')


def text_of(value: str) -> str:
    """The part of a template that shows a JavaScript value as text. Gradio takes what Handlebars leaves for a
    JavaScript template, so {{value}} would run a ${...} in it."""
    return "${" + value + r""".replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`)}"""


def line_of(elem_id: str, label: str, attributes: str = "") -> gr.HTML:
    """One line of text, which takes no room while it is empty."""
    return gr.HTML("", label=label, elem_id=elem_id, elem_classes="line",
                   html_template=f"${{value ? `<p{attributes}>{text_of('value')}</p>` : ''}}")


def sound_of(elem_id: str, label: str) -> gr.Audio:
    return gr.Audio(type="filepath", sources=["upload", "microphone"], label=label, elem_id=elem_id,
                    buttons=[])


def prompt_of(tab: str) -> gr.Textbox:
    return unread(gr.Textbox("", label="Prompt", max_lines=3, elem_id=f"{tab}-prompt",
                             placeholder="optional, such as: at deep dusk"))


def slider_of(elem_id: str, label: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    return unread(gr.Slider(low, high, value, step=step, label=label, elem_id=elem_id, buttons=[],
                            min_width=140))


def seed_of(tab: str) -> gr.Number:
    return unread(gr.Number(0, label="Seed", precision=0, elem_id=f"{tab}-seed", min_width=90))


def image_of(elem_id: str, label: str, buttons: list[str]) -> gr.Image:
    return gr.Image(label=label, elem_id=elem_id, interactive=False, type="pil", format="png",
                    buttons=buttons)


def gallery_of(elem_id: str, label: str) -> gr.Gallery:
    return gr.Gallery(label=label, elem_id=elem_id, format="png", object_fit="contain", height="auto",
                      interactive=False, type="pil", buttons=["download", "fullscreen"])


def buttons_of(tab: str, label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row(elem_classes="buttons"):
        return (gr.Button(label, variant="primary", elem_id=f"{tab}-go", scale=3, min_width=120),
                gr.Button("Stop", elem_id=f"{tab}-stop", scale=1, min_width=80))


def build(page: Page) -> gr.Blocks:
    """The page's parts, and what each does."""
    studio = page.studio
    with CheckedBlocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML({"run": str(studio.adapter_path), "device": str(studio.device).upper(),
                 "warning": studio.facts["warning"]}, elem_id="head", html_template=(
            f"<h1>{TITLE}</h1><p>{text_of('value.run')} · {text_of('value.device')}</p>"
            f"${{value.warning ? `<p class='note'>{text_of('value.warning')}</p>` : ''}}"))
        with gr.Tabs():
            with gr.Tab("One sound", elem_id="one"):
                build_one(page)
            with gr.Tab("Two sounds", elem_id="two"):
                build_two(page)
            with gr.Tab("Long sound", elem_id="long"):
                build_long(page)
            with gr.Tab("Live", elem_id="live"):
                build_live(page)
        blocks.unload(page.left)
    return blocks.queue(max_size=32, default_concurrency_limit=1)


def stop_of(page: Page, tab: str, button: gr.Button, event, message: gr.HTML) -> None:
    """Stop ends what runs, between two steps, and takes what waits out of the queue."""
    def stop(request: gr.Request) -> str:
        page.jobs.stop(request.session_hash, tab)
        return "stopped"
    button.click(stop, outputs=message, **QUIET)
    button.click(None, cancels=[event])


def pick_of(page: Page, tab: str, label: str, samples: list[tuple[str, list]], outputs: list) -> None:
    """Buttons that fill in sounds. samples: (name, for each output a function that gives a file)."""
    if not samples:
        return
    names = gr.Dataset(components=[gr.Textbox(visible=False)], samples=[[name] for name, _ in samples],
                       label=label, type="index", elem_id=f"{tab}-examples", layout="gallery",
                       samples_per_page=12)

    def fill(i: int):
        files = [make() for make in samples[i][1]]
        return files if len(files) > 1 else files[0]
    names.click(fill, names, outputs, **QUIET)


def build_one(page: Page) -> None:
    data = page.studio.data
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            sound = sound_of("one-audio", "Sound")
            pick_of(page, "one", "Examples that training never heard",
                    [(plain(row.label) or row.audio_path.stem, [lambda row=row: page.take(row)])
                     for row in data.examples], [sound])
            if data.listed:
                of_own = [f"{row.split}: {plain(row.label)}, {row.text} ({row.audio_path.name})"[:110]
                          for row in data.listed]
                more = f"; {data.left_out} more are not listed" if data.left_out else ""
                own = gr.Dropdown([*zip(of_own, range(len(of_own)))], value=None, elem_id="one-own",
                                  label="Or a clip of the run's own data", info=f"type to search{more}")
                own.input(lambda i: None if i is None else page.take(data.listed[i]), own, sound, **QUIET)
            else:
                gr.HTML(data.why, elem_id="one-own",
                        html_template=f"<p class='quiet'>No examples here: {text_of('value')}.</p>")
            prompt = prompt_of("one")
            with gr.Row():
                strength = slider_of("one-strength", "Strength", 0, 3, 1, 0.05)
                guidance = slider_of("one-guidance", "Guidance", 1, 15, GUIDANCE, 0.5)
            with gr.Row():
                count = slider_of("one-count", "Pictures", 1, MOST_PICTURES, 1, 1)
                seed = seed_of("one")
            go, stop = buttons_of("one", "Draw")
        with gr.Column(scale=6, min_width=320):
            message = message_of("one")
            shown = gallery_of("one-pictures", "Pictures")
            heat_map = unread(gr.Checkbox(False, label="Show where the sound acted", elem_id="one-map"))
            heard = line_of("one-heard", "heard")
            heard_as = image_of("one-spectrogram", "Spectrogram", [])
    made = gr.State([])
    inputs = [sound, prompt, strength, guidance, seed, count, heat_map]
    event = go.click(page.one_sound, inputs, [made, shown, heard_as, heard, message], api_name="one_sound",
                     show_progress_on=[shown], **MODEL)
    stop_of(page, "one", stop, event, message)
    heat_map.input(show, [made, heat_map], shown, **QUIET)


def build_two(page: Page) -> None:
    examples = page.studio.data.examples
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                first = sound_of("two-first", "First sound")
                second = sound_of("two-second", "Second sound")
            pick_of(page, "two", "Examples", [
                (f"{plain(a.label) or a.audio_path.stem} + {plain(b.label) or b.audio_path.stem}",
                 [lambda a=a: page.take(a), lambda b=b: page.take(b)])
                for a, b in zip(examples[::2], examples[1::2])], [first, second])
            mix = slider_of("two-mix", "Mix: first alone to second alone", 0, 1, 0.5, 0.05)
            prompt = prompt_of("two")
            with gr.Row():
                count = slider_of("two-count", "Pictures in the strip", 2, MOST_STEPS, 5, 1)
                seed = seed_of("two")
            go, stop = buttons_of("two", "Draw")
        with gr.Column(scale=6, min_width=320):
            message = message_of("two")
            picture = image_of("two-picture", "Both at once", ["download", "fullscreen"])
            strip = gallery_of("two-strip", "From the first to the second")
    event = go.click(page.two_sounds, [first, second, mix, count, prompt, seed], [picture, strip, message],
                     api_name="two_sounds", show_progress_on=[picture], **MODEL)
    mix.release(page.mixed, [first, second, mix, prompt, seed], [picture, message], show_progress="hidden",
                trigger_mode="always_last", api_visibility="private", **MODEL)
    stop_of(page, "two", stop, event, message)


BOARD = """{{#if value}}<audio controls preload="metadata" src="{{value.sound}}"></audio>
<div class="board">{{#each value.windows}}<button type="button" data-start="{{this.start_s}}"
aria-label="play from {{this.time}}"><img src="{{this.picture}}" alt="picture {{this.number}}">
<span>&#9654; {{this.time}}{{#if this.silent}} silent{{/if}}</span></button>{{/each}}</div>{{/if}}"""
PLAY = """
element.addEventListener("click", event => {
    const window = event.target.closest("button[data-start]"), sound = element.querySelector("audio");
    if (window) { sound.currentTime = Number(window.dataset.start); sound.play(); }
});
element.addEventListener("timeupdate", event => {  // the window that is heard now
    const windows = [...element.querySelectorAll("button[data-start]")];
    const begun = windows.filter(one => Number(one.dataset.start) <= event.target.currentTime + 0.05);
    windows.forEach(one => one.classList.toggle("now", one === begun.at(-1)));
}, true);
"""


def build_long(page: Page) -> None:
    examples = page.studio.data.examples[:6]
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            sound = sound_of("long-audio", "Long sound")
            pick_of(page, "long", "Example", [(f"{len(examples)} sounds, one after another",
                                               [lambda: page.joined(examples)])] if len(examples) > 1 else [],
                    [sound])
            prompt = prompt_of("long")
            with gr.Row():
                every = slider_of("long-every", "Seconds between", 0.5, 30, 2, 0.5)
                seed = seed_of("long")
            go, stop = buttons_of("long", "Draw")
        with gr.Column(scale=6, min_width=320):
            message = message_of("long")
            board = gr.HTML(None, label="storyboard", elem_id="long-board", html_template=BOARD,
                            js_on_load=PLAY)
    event = go.click(page.long_sound, [sound, every, prompt, seed], [board, message],
                     api_name="long_sound", **MODEL)
    stop_of(page, "long", stop, event, message)


def build_live(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            sound = gr.Audio(type="numpy", sources=["microphone"], streaming=True, label="Microphone",
                             elem_id="live-audio", buttons=[])
            prompt = prompt_of("live")
            with gr.Row():
                strength = slider_of("live-strength", "Strength", 0, 3, 1, 0.05)
                seed = seed_of("live")
            gr.HTML('<p class="quiet">The seed is held, so that only the sound moves the picture.</p>')
        with gr.Column(scale=6, min_width=320):
            message = message_of("live")
            picture = image_of("live-picture", "Now", ["fullscreen"])
            rate = line_of("live-rate", "rate")
    stream = gr.State(None)
    shown, settings = [picture, rate, message], [prompt, strength, seed, stream]
    live = {"show_progress": "hidden", "concurrency_id": "live", "concurrency_limit": LIVE_DRAWN}
    # The sound comes in by one event and the pictures go out by another: or a piece that comes while a
    # picture is drawn would be lost. A stream holds its place for as long as it lasts, so that any number may
    # come in; the pictures are drawn in turn.
    clock = gr.Timer(LIVE_EVERY_S, active=False)
    sound.start_recording(lambda: (None, gr.Timer(active=True)), outputs=[stream, clock], **QUIET)
    sound.stop_recording(lambda: gr.Timer(active=False), outputs=clock, **QUIET)
    sound.stream(page.feed, [sound, stream], stream, stream_every=LIVE_EVERY_S, show_progress="hidden",
                 api_visibility="private", concurrency_limit=None)
    clock.tick(page.now, settings, shown, trigger_mode="once", api_visibility="private", **live)
    # a stream takes no calls of the API: both in one are an endpoint, of a button that is not shown
    piece = gr.Audio(type="filepath", label="Sound", visible=False)
    gr.Button(visible=False).click(page.live, [piece, *settings], [*shown, stream], api_name="live", **live)


def launch_options() -> dict:
    """What Blocks.launch() takes of the page's look, and what is left out: no record of calls in the browser,
    no links to elsewhere, no server-side rendering by Node."""
    return {"theme": theme(), "css_paths": [HERE / "style.css"], "footer_links": ["api", "settings"],
            "run_history": False, "ssr_mode": False, "enable_monitoring": False, "pwa": False,
            "mcp_server": False}
