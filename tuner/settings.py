"""What a person decides, as one frozen value. Flag > environment TUNER_SECTION__KEY > YAML file > default.

An unknown key is an error with a suggestion, and so is a value out of range: a tuner that misread its
settings would change a serving engine by mistake. How the layers meet: `tuner.settings_layers`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from runtime import knobs as runtime_knobs
from runtime.plan import MAX_LEASE_S
from tuner.settings_knobs import KnobSettings
from tuner.settings_layers import Layered, environment_layers, file_layer, flag_layer, layered
from tuner.settings_notice import ForecastSettings, NoticeSettings
from tuner.settings_quality import QualitySettings
from tuner.settings_section import Section
from tuner.settings_traffic import BurstSettings, OutputTokens, PromptShare, TrafficSettings

__all__ = [
    "AASettings", "ApiSettings", "BurstSettings", "CollectSettings", "ExperimentSettings", "ForecastSettings",
    "GuardrailSettings", "NoticeSettings",
    "HoldbackSettings", "KeepSettings", "KnobSettings", "LearnSettings", "ModelSettings", "ObjectiveSettings",
    "OutputTokens", "PromptShare", "QualitySettings", "SLOSettings", "SearchSettings", "ServerSettings", "Settings",
    "TrafficSettings", "load_settings", "load_settings_with_origins",
]  # fmt: skip

Port = Annotated[int, Field(ge=0, le=65535)]
LatencyMetric = Literal["e2e_s", "ttft_s", "tpot_s"]

BUNDLED_MODEL = "demo"
BUNDLED_MODEL_PATH = Path(runtime_knobs.__file__).parent / "demo_model"


class ModelSettings(Section):
    """The model to serve."""

    path: str = Field(default=BUNDLED_MODEL, min_length=1)
    """Folder of the model; `demo` is the small one that comes with the runtime."""
    name: str | None = Field(default=None, min_length=1)
    """The name that clients use; the last part of the path if not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; `auto` takes a GPU when one answers."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of weights and activations."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt plus output, in tokens; what the model allows if not given."""
    kv_tokens: int | None = Field(default=None, ge=64)
    """Tokens that the KV cache holds; fitted to the memory if not given."""

    @property
    def location(self) -> Path:
        """The folder that the runtime opens, absolute: the bundled one for `demo`, else the path as given."""
        return (BUNDLED_MODEL_PATH if self.path == BUNDLED_MODEL else Path(self.path).expanduser()).resolve()


class ServerSettings(Section):
    """Where clients and the daemon reach the runtime."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address on which clients are served; one that other machines reach needs a key."""
    api_key_file: Path | None = None
    """File whose first line is the key that clients must bring; TUNER_API_KEY if not given."""
    insecure: bool = False
    """True serves other machines without a key, as behind a proxy that asks for one."""
    port: Port = 8000
    """Port on which clients are served; 0 is any free one."""
    control_port: Port = 0
    """Port of the daemon's own control connection, always on loopback; 0 is any free one."""
    drain_s: float = Field(default=30.0, ge=0, le=3600)
    """How long running requests may finish when the server stops, in seconds."""
    request_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """After how many seconds a request that has not finished is ended."""


class ObjectiveSettings(Section):
    """What the tuner makes smaller."""

    metric: LatencyMetric = "e2e_s"
    """End-to-end latency, time to first token, or time per output token."""
    min_effect: float = Field(default=0.03, ge=0, lt=1)
    """Smallest gain worth a change; 0.03 is 3 percent."""


class SLOSettings(Section):
    """A limit on a statistic of a metric, which no configuration may breach."""

    metric: Literal["e2e_s", "ttft_s", "tpot_s", "errors"]
    """What is limited."""
    statistic: Literal["p50", "p95", "p99", "mean", "share"]
    """Of a latency p50, p95, p99 or mean; of errors the share."""
    limit: float = Field(gt=0)
    """Seconds, or for errors a share of all requests."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.metric == "errors") != (self.statistic == "share"):
            fix = "`share`" if self.metric == "errors" else "one of p50, p95, p99, mean"
            raise ValueError(
                f"`slos.statistic` of `{self.metric}` must be {fix}, but got {self.statistic!r}."
            )
        if self.statistic == "share" and self.limit >= 1:
            raise ValueError(
                f"`slos.limit` of a share must be less than 1, but got {self.limit:g}. 0.01 is 1 percent."
            )
        return self


class LearnSettings(Section):
    """The time in which only the champion serves and is measured."""

    champion_s: float = Field(default=120.0, ge=0, le=86400)
    """Seconds of the champion's own traffic before the first search."""


class SearchSettings(Section):
    """How candidates are looked for."""

    enabled: bool = True
    """False measures and notices, and proposes nothing."""
    max_probes: int = Field(default=6, ge=1, le=1000)
    """Candidates that a study may probe on live traffic."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the sampler. Coins have none: they come from the operating system, and stand in the journal."""
    rest_s: float = Field(default=900.0, ge=0)
    """Seconds between the end of a study and the next scheduled one."""
    trust_steps: int = Field(default=1, ge=1, le=4)
    """How many steps a knob may move from the champion at first."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """Optuna's sampler."""


class ExperimentSettings(Section):
    """How a challenger is judged against the champion."""

    slice_s: float = Field(default=12.0, gt=0, le=3600)
    """Seconds that one configuration serves before the other has its turn."""
    burn_in_s: float = Field(default=3.0, ge=0, le=1800)
    """Seconds at the start of a slice that are served and not judged."""
    max_pairs: int = Field(default=30, ge=5, le=1000)
    """Pairs of slices after which the experiment ends without a winner."""
    look_every: int = Field(default=5, ge=1, le=100)
    """Pairs between two looks at the evidence."""
    fdr: float = Field(default=0.05, gt=0, le=0.2)
    """Share of false promotions among all promotions that the stream of experiments is held to."""
    lease_s: float = Field(default=MAX_LEASE_S, gt=0, le=MAX_LEASE_S)
    """Seconds after which the engine is back at the champion when the daemon is silent."""
    settle_s: float = Field(default=4.0, ge=0, le=600)
    """Seconds after a pair in which its last requests may finish before it is scored."""
    min_requests: int = Field(default=5, ge=1)
    """Judged requests that a slice needs to count; where traffic is thin, slices are lengthened for it."""
    max_wall_s: float = Field(default=14400.0, gt=0)
    """Seconds after which an experiment ends without a winner; one that could not end by then is not opened."""
    harm_budget: float = Field(default=0.02, gt=0, le=1)
    """Latency that challengers may add in a day, as a share of all requests' latency; then they wait."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.burn_in_s >= self.slice_s / 2:
            raise ValueError(
                f"`experiment.burn_in_s` must be less than half of `experiment.slice_s` ({self.slice_s:g}), "
                f"but got {self.burn_in_s:g}. Lengthen the slice or shorten the burn-in."
            )
        if self.max_pairs % self.look_every:
            raise ValueError(
                f"`experiment.max_pairs` must be a multiple of `experiment.look_every` ({self.look_every}), "
                f"but got {self.max_pairs}. Take {max(1, self.max_pairs // self.look_every) * self.look_every}."
            )
        return self


class HoldbackSettings(Section):
    """The former champion's share of the traffic after a promotion: does the gain stay?"""

    share: float = Field(default=0.05, ge=0, le=0.1)
    """Slowdown that probation may cost on average; it and the gain give the former champion's share. 0 is off."""
    duration_s: float = Field(default=1800.0, gt=0)
    """Seconds of probation after a promotion; it lasts longer where ten holdback pairs need longer."""


class AASettings(Section):
    """Experiments of the champion against itself, at all hours: how often would a change without effect win?"""

    share: float = Field(default=0.02, ge=0, le=0.5)
    """Share of the time that they take, when nothing else is tried; 0 is off."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """Share of them that may be promoted by chance."""
    max_pairs: int = Field(default=10, ge=5, le=1000)
    """Pairs of slices of one of them."""


class GuardrailSettings(Section):
    """What stops a challenger at once, without statistics."""

    max_error_ratio: float = Field(default=0.01, ge=0, le=1)
    """Share of failed requests."""
    min_requests: int = Field(default=20, ge=1)
    """Requests before a ratio is looked at."""


class CollectSettings(Section):
    """How often the runtime and the hardware are sampled."""

    interval_s: float = Field(default=1.0, ge=0.1, le=60)
    """Seconds between two samples."""


class KeepSettings(Section):
    """How long what was measured is kept, and how much room it may take. Decisions are kept for ever."""

    raw_s: float = Field(default=86400.0, ge=3600)
    """Seconds that samples are kept as they were taken."""
    minutes_s: float = Field(default=14 * 86400.0, ge=86400)
    """Seconds that means, lows and highs of a minute are kept."""
    hours_s: float = Field(default=400 * 86400.0, ge=86400)
    """Seconds that means, lows and highs of an hour are kept."""
    steps_s: float = Field(default=86400.0, ge=3600)
    """Seconds that the engine's steps are kept."""
    timings_s: float = Field(default=7 * 86400.0, ge=3600)
    """Seconds that the timings of single requests are kept."""
    max_bytes: int = Field(default=2_000_000_000, ge=50_000_000)
    """Size of the store beyond which the oldest of these go before their time."""
    min_free_bytes: int = Field(default=256_000_000, ge=1_000_000)
    """Room on the disk below which no metrics are written and no experiment starts."""
    backup_every_s: float = Field(default=86400.0, ge=3600)
    """Seconds between two backups of the decisions, in the folder `backups` of the data folder."""
    num_backups: int = Field(default=7, ge=1, le=1000)
    """Backups that are kept."""


class ApiSettings(Section):
    """The daemon's own local API: approvals, rollbacks, pauses."""

    port: Port = 0
    """Port on loopback; 0 is any free one."""


class DashboardSettings(Section):
    """The dashboard that `tuner run` starts beside itself; `tuner dashboard` starts one at any time."""

    enabled: bool = False
    """True starts it with the tuner and stops it with the tuner."""
    port: Port = 8501
    """Port on loopback; where it is taken, any free one."""


class Settings(Section):
    """Everything that `tuner run` is told."""

    model: ModelSettings = ModelSettings()
    server: ServerSettings = ServerSettings()
    data_dir: Path = Path("var/tuner")
    """Folder of the store, the logs and the keys."""
    mode: Literal["auto", "approve", "observe"] = "approve"
    """`auto` applies what won, `approve` asks a person first, `observe` never changes the engine."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe line that is logged."""
    objective: ObjectiveSettings = ObjectiveSettings()
    slos: tuple[SLOSettings, ...] = ()
    """Limits that no configuration may breach."""
    knobs: KnobSettings = KnobSettings()
    learn: LearnSettings = LearnSettings()
    search: SearchSettings = SearchSettings()
    experiment: ExperimentSettings = ExperimentSettings()
    holdback: HoldbackSettings = HoldbackSettings()
    aa: AASettings = AASettings()
    guardrail: GuardrailSettings = GuardrailSettings()
    notice: NoticeSettings = NoticeSettings()
    traffic: TrafficSettings | None = None
    """Requests that the tuner makes itself; none if not given."""
    collect: CollectSettings = CollectSettings()
    keep: KeepSettings = KeepSettings()
    quality: QualitySettings = QualitySettings()
    api: ApiSettings = ApiSettings()
    dashboard: DashboardSettings = DashboardSettings()
    evidence: dict[str, Any] | None = None
    """What proved an exported configuration; kept for people, and not interpreted."""

    @field_validator("data_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return path.expanduser()


def load_settings(
    path: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """The settings in force: `flags` (dotted key -> value) over `environ` (os.environ if None) over the file.

    Raises:
        SettingsError: every problem found, one line each.
    """
    return load_settings_with_origins(path, flags, environ).value


def load_settings_with_origins(
    path: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Layered[Settings]:
    """As `load_settings`, with the place that each key which is not at its default came from."""
    layers = [file_layer(path)] if path is not None else []
    layers += environment_layers(Settings, environ)
    layers += [flag_layer(flags)] if flags else []
    return layered(Settings, layers)
