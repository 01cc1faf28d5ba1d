"""What the commands know of a benchmark: `sample`, `score`, `evaluate`, `report` and `plan` use `Benchmark` alone.

A benchmark is a file or folder with one object of this class, listed in `benchmarks.BENCHMARKS`. `phantom --help`
imports these files: what needs torch or a decoder is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from phantom.config import Params
from phantom.errors import UserError

if TYPE_CHECKING:
    from phantom.evaluation.page import Page, Table
    from phantom.evaluation.sampling_spec import Model, Settings, VideoRequest

Scores = Mapping[str, Any]  # what `phantom score --json` prints: `score`, `benchmark`, and the figures beside them


@dataclass(frozen=True)
class Figure:
    """A number of a score file and how it is displayed. `better`: +1 if higher is better, -1 if lower is better."""

    key: str
    name: str
    note: str
    digits: int
    better: int
    scale: float = 1.0
    unit: str = ""  # after `scale`

    @property
    def title(self) -> str:
        """The name with the unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name


@dataclass(frozen=True)
class Mark:
    """What a score is worth, as a floor or a ceiling: a value from 0 to 100, and what it is the score of."""

    value: float
    text: str


@dataclass(frozen=True)
class Published:
    """The scores of a publication, by model and figure, in the units of our fields.

    videos: how many they are of, and what these are; 0 where a number of videos says nothing. uncertain: what the
    publication leaves open.
    """

    models: Mapping[str, Mapping[str, float]]
    videos: int = 0
    videos_of: str = ""
    uncertain: str = ""


NOTHING_PUBLISHED = Published({})


class VideoSet(NamedTuple):
    """Videos to generate with the same settings."""

    settings: Settings
    requests: Sequence[VideoRequest]


@dataclass(frozen=True)
class Workload:
    """What a model has to do for a benchmark, in passes of its denoiser.

    items: videos, or clips; None where it cannot be told before the data is there. frames: of a pass. passes: per item.
    interventions: times that Phantom does it again with z replaced.
    """

    items: int | None
    frames: int
    passes: int
    interventions: int = 0

    @classmethod
    def of_videos(cls, count: int | None, settings: Settings, interventions: int = 0) -> Workload:
        """Of videos generated with `settings`, with all rounds of self-refinement, in each window."""
        return cls(count, settings.num_frames, settings.windows * settings.sampling.passes, interventions)


@dataclass(frozen=True)
class Option:
    """An option of a command, whose value is passed on under its name. A default of `...` makes it required.

    flags: as it is typed, if not `--` and the name. least: of a number.
    """

    name: str
    type: Any
    help: str
    default: Any = None
    flags: tuple[str, ...] = ()
    least: int | None = None


@dataclass(frozen=True)
class Run:
    """What `phantom evaluate` has made for a benchmark. Paths in the settings are relative to `root`.

    sets: `Benchmark.videos`. folders: of the generated videos, by the keys of `sets` and by model. models: base,
    Phantom and others, each loaded when it is first used. work: for what is reused, by content.
    """

    params: Params
    root: Path
    work: Path
    sets: Mapping[str, VideoSet]
    folders: Mapping[str, Mapping[str, Path]]
    models: Callable[[], Iterable[Model]]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation says of the models.

    entries: of evaluation.json. scores: by mode, or under the benchmark's name, and by model. page: with title, lede,
    bars and scenes of the run's page; None where the tables say it all. verdict: in a sentence.
    """

    entries: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, float | None]]
    tables: Sequence[Table] = ()
    page: Page | None = None
    verdict: str = ""


GENERATED = Option("generated", Path | None, "A folder of mp4 files.")
WORK = Path("checkpoints/judged")


class Benchmark:
    """A benchmark; what a subclass does not say has the default of one whose score files hold numbers alone."""

    name: str  # in commands, in `evaluate.benchmarks`, and as `benchmark` in score files
    title: str
    score_figure = Figure("score", "Score", "", 1, 1)  # as it is drawn in bars and compared between models
    marks: Sequence[Mark] = ()  # floors and ceilings of the score
    categories = "Score by category"  # what `categories` of a score file is
    sample_options: Sequence[Option] | None = ()  # None: no video is sampled
    intervenes = False  # whether `evaluate.interventions` asks for more videos of it, with z replaced
    score_options: Sequence[Option] = (GENERATED,)
    score_help = ""  # one line
    scored_by_settings = True  # whether `score` takes settings

    def videos(self, params: Params, root: Path = Path(), **options: Any) -> dict[str, VideoSet]:
        """The videos to generate, by mode, or under the benchmark's name where there is one way.

        root: what the paths of the settings are relative to. options: values of `sample_options`; with them it is one
        set. Raises UserError.
        """
        raise NotImplementedError

    def workload(self, params: Params, root: Path) -> list[Workload]:
        """What each model has to do, for `phantom plan`: known before anything is there, and without a download."""
        return [Workload.of_videos(len(found.requests), found.settings) for found in self.videos(params, root).values()]

    def score(self, load: Callable[[], Params], **options: Any) -> dict[str, Any]:
        """A score file: `score`, `benchmark`, and what it is made of. Raises UserError.

        load: reads the settings, where the values of `score_options` do not say everything.
        """
        generated = options["generated"]
        if generated is None:
            raise UserError("--generated: missing; accepted: a folder of mp4 files")
        return self.score_folder(load(), generated, WORK)

    def score_folder(self, params: Params, folder: Path, work: Path) -> dict[str, Any]:
        """The score file of a folder of generated videos, by the settings. work: where ratings are kept."""
        raise NotImplementedError

    def recording(self, folder: Path, protocol: str, file: str, fps: int) -> tuple[Path, int] | None:
        """What really happens in the video called `file`: a recording and its rate, if there is one.

        folder: of the benchmark's recordings. fps: the rate that is preferred. Raises UserError for another folder.
        """
        return None

    def evaluate(self, run: Run) -> Evaluated | None:
        """The models of a run, compared. None: by the `score_folder` of each, side by side."""
        return None

    def as_text(self, result: Scores) -> str:
        """A score file for people."""
        return f"{self.title}: {result['score']:.2f}"

    def hub_places(self, params: Params, **options: Any) -> list[str | None]:
        """Paths, or ids of the hub, of what sampling and scoring read; options as in `videos` and `score`."""
        return []

    def figures(self, scores: Sequence[Scores]) -> Sequence[Figure]:
        """The figures of a table of score files, in order: here all their top-level numbers but the counts."""
        keys = [
            key
            for found in scores
            for key, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in COUNTS
        ]
        return [Figure(key, key.replace("_", " ").capitalize(), "", 2, 1) for key in dict.fromkeys(keys)]

    def published(self, protocol: str) -> Published:
        """The published scores under a protocol; `protocol` is empty where a benchmark has one alone."""
        return NOTHING_PUBLISHED

    def gain(self, base: Scores, other: Scores) -> dict[str, Any] | None:
        """`gain` of `other` over `base` with its 95% interval (`low`, `high`), paired; None if they have no pairs.

        Here over the prompts of both files (`per_prompt`), which weigh the same.
        """
        from phantom.evaluation.gains import prompt_gain

        if not all("per_prompt" in scores for scores in (base, other)):
            return None
        return prompt_gain(base["per_prompt"], other["per_prompt"], {"": 1.0})

    def figure_gain(self, figure: Figure, base: Scores, other: Scores) -> dict[str, Any] | None:
        """`gain` in another figure than the score; None where it is not known."""
        return None

    def items(self, scores: Scores) -> tuple[str, Mapping[str, float]] | None:
        """A title, and the figure `score` of every item by its name, for a table of where gains come from; or None."""
        return None


COUNTS = ("fps", "scenarios", "videos", "prompts", "expected_videos")  # numbers that are not scores
