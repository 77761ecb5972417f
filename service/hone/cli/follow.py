"""Following one job to its end: its events as they come, Ctrl-C among them, never silent for more than five seconds."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from hone import quantities as q
from hone.cli.story import Story, told
from hone.job import Event, EventType, State

LOOK_S = 0.5
"""How often the display looks at the clock when nothing comes."""
LINE_S = 5.0
"""Where the output is no terminal: longest silence, and shortest time between two lines of progress."""


class Signal(Enum):
    """What else can come beside events."""

    INTERRUPT = "Ctrl-C"
    END = "end of the stream"


Item = Event | Signal | BaseException


class Display(Protocol):
    """Shows a story as it grows."""

    def show(self, event: Event, story: Story) -> None:
        """One more event; the story holds it already."""

    def wait(self, story: Story) -> None:
        """Nothing came for a moment."""

    def say(self, text: str) -> None:
        """A line of our own."""

    def pause(self) -> None:
        """Leave the terminal to a question."""

    def close(self) -> None:
        """Leave the terminal for good."""


class Interrupts:
    """Ctrl-C as an item of a queue from the moment this is entered: by itself it stops nothing."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Item] = SimpleQueue()

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.queue.put(Signal.INTERRUPT)

    @contextmanager
    def as_usual(self) -> Iterator[None]:
        """Ctrl-C raises KeyboardInterrupt in the block, so that a question can be left by it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._take)


def follow(
    events: Iterator[Event], interrupts: Interrupts, display: Display, *, on_interrupt: Callable[[], bool]
) -> Story:
    """Show events until they end, or until `on_interrupt` says to leave. Raises what the stream raises."""
    story = Story()
    threading.Thread(target=_pump, args=(events, interrupts.queue), name="events", daemon=True).start()
    try:
        while True:
            match _next(interrupts.queue):
                case None:
                    display.wait(story)
                case Event() as event:
                    story.add(event)
                    display.show(event, story)
                case Signal.INTERRUPT:
                    if on_interrupt():
                        return story
                case Signal.END:
                    return story
                case BaseException() as error:
                    raise error
    finally:
        display.close()


def display_on(console: Console, *, samples: bool = False) -> Display:
    """A moving bar on a terminal, plain lines elsewhere; with `samples`, answers as they come."""
    return (BarDisplay if console.is_terminal else LineDisplay)(console, samples=samples)


class LineDisplay:
    """One line for each event; progress every few seconds."""

    def __init__(self, console: Console, *, samples: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._samples = console, samples
        self._clock = clock
        self._last_line = clock()
        self._last_progress = float("-inf")
        self._told_step = 0
        self._since = clock()

    def show(self, event: Event, story: Story) -> None:
        """Its line; steps only when the last such line is old enough."""
        if line := told(event, samples=self._samples):
            self._print(_line(event, *line))
            self._since = self._clock()
        elif event.type == EventType.PROGRESS and self._clock() - self._last_progress >= LINE_S:
            self._last_progress = self._since = self._clock()
            self._told_step = story.step
            self._print(_line(event, "training", story.progress()))

    def wait(self, story: Story) -> None:
        """A sign of life after a silence; of a paused job there is none."""
        now = self._clock()
        if now - self._last_line < LINE_S or story.state == State.PAUSED:
            return
        if story.step != self._told_step:
            self._last_progress, self._told_step, self._since = now, story.step, now
            detail = story.progress()
        else:
            detail = f"still at step {q.count(story.step)}" if story.step else "goes on"
            detail = f"{detail}, {q.duration(now - self._since)}"
        self._print(f"  {time.strftime('%H:%M:%S')}  {story.what:<10}  {detail}")

    def say(self, text: str) -> None:
        """The line as it is."""
        self._print(text)

    def pause(self) -> None:
        """Nothing moves here."""

    def close(self) -> None:
        """Nothing moves here."""

    def _print(self, text: str | Text) -> None:
        self._console.print(text)
        self._last_line = self._clock()


class BarDisplay:
    """One line for each event, and below them a bar that moves."""

    def __init__(self, console: Console, *, samples: bool = False) -> None:
        self._samples = samples
        self._progress = Progress(
            TextColumn(" "),
            SpinnerColumn("line"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, figures="")
        self._since = time.monotonic()
        self._progress.start()

    def show(self, event: Event, story: Story) -> None:
        """Its line above the bar; steps move the bar."""
        if line := told(event, samples=self._samples):
            self._progress.console.print(_line(event, *line))
        if event.type in (EventType.STATE, EventType.PHASE):
            self._since = time.monotonic()
        self._move(story)

    def wait(self, story: Story) -> None:
        """The seconds of a phase without steps."""
        self._move(story)

    def say(self, text: str) -> None:
        """The line above the bar."""
        self._progress.start()
        self._progress.console.print(text)

    def pause(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def _move(self, story: Story) -> None:
        self._progress.start()  # does nothing while it runs
        if story.step and story.max_steps and story.what in ("training", "evaluation"):
            share = q.share(story.step, story.max_steps)
            self._progress.update(
                self._task,
                description=f"step {q.count(story.step)}/{q.count(story.max_steps)}",
                total=story.max_steps,
                completed=story.step,
                figures=f"{share}  {story.figures()}",
            )
        else:
            elapsed = q.duration(round(time.monotonic() - self._since))
            self._progress.update(self._task, description=story.what, total=None, figures=elapsed)


def _pump(events: Iterator[Event], queue: SimpleQueue[Item]) -> None:
    try:
        for event in events:
            queue.put(event)
        queue.put(Signal.END)
    except BaseException as error:  # the main thread raises it
        queue.put(error)


def _next(queue: SimpleQueue[Item]) -> Item | None:
    try:
        return queue.get(timeout=LOOK_S)
    except Empty:
        return None


def _line(event: Event, word: str, sentence: str) -> Text:
    text = Text(f"  {event.time.astimezone():%H:%M:%S}  ", style="dim")
    style = (
        {EventType.WARNING: "yellow", EventType.FAILURE: "red"}.get(EventType(event.type), "bold")
        if event.type in set(EventType)
        else "bold"
    )
    return text.append(f"{word:<10}", style=f"not dim {style}").append(f"  {sentence}", style="not dim")
