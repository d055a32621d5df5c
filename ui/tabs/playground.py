"""Playground: talk to the live version, or put two versions side by side and ask both the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import gradio as gr

from clm_app.errors import BadInput, ChildFailed, plain
from clm_app.registry import versions
from clm_app.serving.chat import ChatOptions
from ui.house import House
from ui.parts.live import Live, drawing
from ui.parts.words import count, notice, safe
from ui.tabs._base import Tab

NOBODY = ""
SHOW_EVERY_S = 0.1  # pieces are gathered so long before the page is told; a page per token would be slower to read

Turns = list[dict[str, str]]  # role, content and foot (who answered), question and answer by turns


class Answer:
    """One version's reply as it comes: a thread reads it, the page looks at it."""

    def __init__(self, house: House, version: str, messages: list[dict[str, str]], options: ChatOptions) -> None:
        self.version, self.text, self.end, self.tokens, self.problem = version, "", "", 0, ""
        self.is_stopped = threading.Event()
        self._house, self._messages, self._options = house, messages, options
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.is_stopped.is_set() or not self._thread.is_alive()

    def _read(self) -> None:
        try:
            if self._house.router is None:
                raise ChildFailed("Serving is not ready yet. Wait a moment and ask again.")
            with closing(self._house.router.chat(self.version, self._messages, self._options)) as pieces:
                for piece in pieces:
                    if self.is_stopped.is_set():
                        return
                    self.text, self.version = self.text + piece.text, piece.version or self.version
                    self.tokens, self.end = piece.completion_tokens or self.tokens, piece.finish_reason or self.end
        except Exception as err:  # the border of an answer: the sentence takes its place
            self.problem = plain(err)

    def turn(self) -> dict[str, str]:
        """Return the reply as it is now, with the version that gives it."""
        return {"role": "assistant", "content": self.text, "foot": self._foot()}

    def _foot(self) -> str:
        if self.problem:
            return f"no answer from {self.version}: {self.problem}"
        if not self.is_over:
            return f"{self.version} answers …"
        told = ", cut at its longest length" if self.end == "length" else ""
        told = ", stopped" if self.is_stopped.is_set() else told
        return f"{self.version}, {count(self.tokens, 'token')}{told}"


def conversation(turns: Turns) -> str:
    """Return what was said as HTML. The model's text is shown letter by letter, as it is also judged: no Markdown."""
    if not turns:
        return '<p class="clm-quiet clm-hush">Nothing was said yet.</p>'
    items = ""
    for turn in turns:
        foot = f"<small>{safe(turn['foot'])}</small>" if turn["foot"] else ""
        items += f'<li class="clm-{safe(turn["role"])}"><p>{safe(turn["content"])}</p>{foot}</li>'
    return f'<ol class="clm-chat" role="log" aria-live="polite" tabindex="0">{items}</ol>'


def remembered(turns: Turns) -> list[dict[str, str]]:
    """Return the messages for the next question; a question that got no answer is not part of them."""
    pairs = zip(turns[::2], turns[1::2], strict=False)
    return [_message(t) for pair in pairs if pair[1]["content"] for t in pair]


class Playground(Tab):
    """Two panes over one line to write in; what was said is kept per pane."""

    title = "Playground"
    order = 40

    def build(self) -> list:
        """Make the panes and their events."""
        self.answers: dict[str, list[Answer]] = {}  # by page session: what the stop button ends
        with gr.Row(equal_height=True):
            self.left = gr.Dropdown(self._choices(), value="live", label="Talk to", min_width=200)
            self.right = gr.Dropdown(
                [("nobody", NOBODY), *self._choices()], value=NOBODY, label="Compare with", min_width=200,
                elem_id="clm-compare",
            )  # fmt: skip
        with gr.Row(equal_height=True):
            panes = [self._pane("Answers", True), self._pane("Compared answers", False)]
        said = [gr.State([]), gr.State([])]
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label="Message", placeholder="Ask what you would ask it at work", lines=1, max_lines=6, scale=5,
                min_width=240, elem_id="clm-message",
            )  # fmt: skip
            with gr.Column(scale=2, min_width=260, elem_classes="clm-sends"), gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="clm-send", min_width=70)
                stop = gr.Button("Stop", elem_id="clm-stop", min_width=70)
                clear = gr.Button("Clear", min_width=70)
        self.note = drawing()
        with gr.Accordion("How it answers", open=False), gr.Row():
            longest = min(self.workspace.settings.max_new_tokens, 1024)
            self.temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest word each time")
            self.longest = gr.Slider(1, 1024, longest, step=1, label="Longest answer", info="tokens")
        given = [prompt, self.left, self.right, self.temperature, self.longest, *said]
        shown = [prompt, self.note, *panes, *said]
        for trigger in (prompt.submit, send.click):
            trigger(self._talk, given, shown, concurrency_id="talk", concurrency_limit=4, show_progress="hidden")
        stop.click(self._stop, None, None, queue=False)
        clear.click(self._stop, None, None, queue=False).then(
            lambda: (conversation([]), conversation([]), [], [], ""), None, [*panes, *said, self.note], queue=False
        )
        self.right.change(
            lambda name: gr.update(visible=name != NOBODY), self.right, panes[1], queue=False, show_progress="hidden"
        )
        return []

    def _pane(self, label: str, is_seen: bool) -> gr.HTML:
        return drawing(
            conversation([]), label=label, show_label=True, container=True, visible=is_seen, autoscroll=True,
            min_height=380, max_height=380, min_width=280, elem_classes="clm-pane",
        )  # fmt: skip

    def live(self) -> list[Live]:
        """Return the two choices of a version."""
        return [
            Live([self.left], lambda: gr.update(choices=self._choices())),
            Live([self.right], lambda: gr.update(choices=[("nobody", NOBODY), *self._choices()])),
        ]

    def _choices(self) -> list[tuple[str, str]]:
        live, found = versions.live(self.workspace).name, versions.everything(self.workspace)
        return [(f"the live version (now {live})", "live"), *((v.name, v.name) for v in found)]

    def _talk(
        self, prompt: str, left: str, right: str, temperature: float, longest: int, said_left: Turns, said_right: Turns,
        request: gr.Request,
    ) -> Iterator[tuple]:  # fmt: skip
        """Ask one version, or two at once, and show their replies as they come."""
        try:
            if not prompt.strip():
                raise BadInput("The message is empty. Write something, then send it.")
            options = ChatOptions(temperature=temperature, max_tokens=int(longest))
        except Exception as err:
            yield gr.skip(), notice(plain(err), "problem"), *[gr.skip()] * 4
            return
        asked = {"role": "user", "content": prompt.strip(), "foot": ""}
        panes = [(left, said_left), (right, said_right)][: 1 if right == NOBODY else 2]
        answers = [Answer(self.house, name, [*remembered(said), _message(asked)], options) for name, said in panes]
        self.answers[request.session_hash] = answers
        try:
            written = ""  # empties the line once; what is typed meanwhile stays
            while True:
                is_over = all(answer.is_over for answer in answers)  # before showing, so that the last piece is shown
                turns = [[*said, asked, answer.turn()] for (_, said), answer in zip(panes, answers, strict=True)]
                skipped = [gr.skip()] * (2 - len(turns))
                kept = [*turns, *skipped] if is_over else [gr.skip()] * 2
                yield written, "", *map(conversation, turns), *skipped, *kept
                if is_over:
                    return
                written = gr.skip()
                time.sleep(SHOW_EVERY_S)
        finally:  # also when the page was closed or asked anew: nobody reads these any more
            for answer in answers:
                answer.is_stopped.set()
            self.answers.pop(request.session_hash, None)

    def _stop(self, request: gr.Request) -> None:
        for answer in self.answers.get(request.session_hash, []):
            answer.is_stopped.set()


def _message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": turn["role"], "content": turn["content"]}
