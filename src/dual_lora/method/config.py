"""DualLoraConfig: the user's options, checked when they are set."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from peft.config import PeftConfig
from peft.utils import PeftType

from ..core.reference import Form, Magnitude, Ste
from . import lora_fields
from .config_checks import PAPER_WARMUP, check_frozen, check_names, check_share, check_start, upgrade_format_1
from .fused_experts import READ
from .lora_fields import is_positive
from .ranks import Rank, ranks_of, split_rank
from .saved import check_file

Start = bool | Literal["aligned", "paper", "zero"]
Direction = Literal["sign", "identity", "frozen"]
Sampling = float | Literal["auto"] | None
FORMAT_VERSION = 2  # 1: the paper's start was the default, `init_weights=True`

ALPHA, EARLIER_ALPHA = 4.0, 2.0
"""α / r by default, where one step gains as much as LoRA's with `lora_alpha=2*r`, and of the paper's start."""

CHECKED = ("r", "r1", "r2", "init_weights", "init_std", "init_gain", "warmup_steps")  # again when they are written


@dataclass
class DualLoraConfig(PeftConfig):
    """Configuration of Dual LoRA: ΔW = α/√(r1 r2) · ReLU(B A) ⊙ Sign(D C).

    `r` is the total budget: `DualLoraConfig(r=16)` trains as many parameters as `LoraConfig(r=16)`, with
    r1 = r2 = 8. At the start B is zero, and with it ΔW. A learning rate that suits LoRA suits this method.

    LoRA's names are taken as well. `lora_alpha=16` is the strength that LoRA has with it (`alpha=32`), `lora_dropout`
    is `dropout`. LoRA's other fields are taken where they mean plain LoRA. `DualLoraConfig.paper(…)` is the paper's
    start: Gaussian factors, whose update a warm-up brings in.

    Raises ValueError for ranks, scales and names that cannot be, saying what was received and what to write instead.
    """

    r: int | None = field(
        default=None,
        metadata={"help": "Total rank r1 + r2; 8 when neither r nor r1 and r2 are given. Same size as LoRA's r."},
    )
    r1: int | None = field(
        default=None, metadata={"help": "Rank of the magnitude group (A, B). Default: r / 2, rounded up."}
    )
    r2: int | None = field(
        default=None,
        metadata={"help": "Rank of the direction group (C, D). Default: r / 2, rounded down, at least 1."},
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Scale: ΔW is multiplied by α/√(r1 r2). Twice LoRA's `lora_alpha`. Default: 4 (r1 + r2), of each "
            "layer's own ranks; 2 (r1 + r2) with the paper's start."
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter branch's input; 0 is the fastest."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module names, a regular expression, or 'all-linear'. Default: as LoRA for known models."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules that get no adapter."}
    )
    bias: Literal["none", "all", "dual_lora_only"] = field(
        default="none", metadata={"help": "Which biases train: 'none', 'all' or 'dual_lora_only'."}
    )
    init_weights: Start = field(
        default=True,
        metadata={
            "help": "True: B = 0, so that ΔW = 0 at the start, and A as LoRA draws it. 'aligned': the same with signs "
            "of rank one. 'paper': Gaussian factors with a warm-up (see `DualLoraConfig.paper`). 'zero': B = 0, the "
            "rest Gaussian, an earlier default. False: random factors at full strength (for tests; it changes the "
            "model's output)."
        },
    )
    init_std: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation σ of C and D, which sets how fast signs flip. Default: 0.04; in embeddings and "
            "with 'aligned' 0.1. With 'zero' (0.02) also of A, with 'paper' (0.02) of all four factors."
        },
    )
    init_gain: float | None = field(
        default=None,
        metadata={
            "help": "Width of A's random start, in times LoRA's. Default: 1.5; in embeddings and with 'aligned' 1."
        },
    )
    warmup_steps: int | float | None = field(
        default=None,
        metadata={
            "help": "For the paper's start only: optimizer steps over which λ rises from 0 to 1 (50 by default). A "
            "number below 1 is a share of the Trainer's run and needs `DualLoraCallback`. 0: no warm-up."
        },
    )
    ste: Ste = field(
        default="clip",
        metadata={
            "help": "Straight-through estimator of Sign: 'clip' (the paper), 'identity', 'hardtanh' or 'surrogate'."
        },
    )
    magnitude_activation: Magnitude = field(
        default="relu", metadata={"help": "'relu' (the method) or 'identity' (ablation without ReLU)."}
    )
    direction_activation: Direction = field(
        default="sign",
        metadata={
            "help": "'sign' (the method), 'identity' (ablation without Sign) or 'frozen'. Frozen: Sign(D C) is "
            "replaced by random signs S₀ that never change. There is no C and D then, so all of r is in B A, and "
            "ΔW = `lora_alpha`/r · m(B A) ⊙ S₀, where m is `magnitude_activation`."
        },
    )
    direction_seed: int = field(
        default=0,
        metadata={"help": "For frozen signs: each layer's seed is made from this number and the layer's name."},
    )
    plain_rank: int = field(
        default=0,
        metadata={
            "help": "With frozen signs: how much of r is a plain product, as in LoRA. ΔW is the sum of both, "
            "`lora_alpha`/r · (B₀A₀ + m(B₁A₁) ⊙ S₀)."
        },
    )
    token_sampling: Sampling = field(
        default=None,
        metadata={
            "help": "Share of a step's tokens for an unbiased estimate of the factors' gradients, which is faster and "
            "noisier. 'auto': as few tokens as a bound on the noise allows. None: all tokens."
        },
    )
    sampling_pattern: dict[str, Sampling] = field(
        default_factory=dict, metadata={"help": "`token_sampling` of single layers by name or regular expression."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Set this if the layer stores its weight as (in, out), like GPT-2's Conv1D."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train fully and save with the adapter (e.g. a head)."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indexes of the layers to adapt; needs target_modules as names."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the model's list of layers, if it is an unusual one."}
    )
    rank_pattern: dict[str, Rank] = field(
        default_factory=dict,
        metadata={"help": "Ranks of single layers by name or regular expression: a total, or [r1, r2]."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "`lora_alpha` of single layers by name or regular expression, as in LoraConfig. If `alpha` is "
            "given too, the numbers are α."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings train, as in LoraConfig."}
    )
    layer_replication: list[tuple[int, int]] | None = field(
        default=None, metadata={"help": "Build a larger model from ranges of layers, as in LoraConfig."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of nn.Parameters to adapt (expert weights of MoE models)."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Keep tied embeddings tied when one of them is trained, as in LoraConfig."}
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Format of a saved adapter. Written by the package."}
    )

    def __post_init__(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter is saved in format {self.format_version}; this version of dual-lora reads formats up to "
                f"{FORMAT_VERSION}. Nothing was loaded. Update the package: pip install --upgrade dual-lora."
            )
        super().__post_init__()
        self.peft_type = PeftType.DUAL_LORA  # type: ignore[attr-defined]
        self._custom_modules: dict[type, type] | None = None
        self.r1, self.r2 = split_rank(self.r, self.r1, self.r2, one_group=self.one_group)
        self.r = self.r1 + self.r2
        for name in ("rank_pattern", "alpha_pattern", "sampling_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a mapping of names to values, got {getattr(self, name)!r}.")
            # As the file has them: the first that fits counts.
            setattr(self, name, dict(sorted(getattr(self, name).items())))
        for key, rank in self.rank_pattern.items():
            ranks_of(rank, where=f"rank_pattern[{key!r}]", one_group=self.one_group)
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if alpha is not None and not is_positive(alpha):
                raise ValueError(f"{name} must be a positive number, got {alpha!r}.")
        self._check_start()
        shares = {"token_sampling": self.token_sampling}
        shares |= {f"sampling_pattern[{k!r}]": v for k, v in self.sampling_pattern.items()}
        for name, share in shares.items():
            check_share(name, share)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout (lora_dropout) must be at least 0 and below 1, got {self.dropout!r}.")
        if self.bias not in ("none", "all", "dual_lora_only"):
            raise ValueError(f"Unknown bias {self.bias!r}: choose 'none', 'all' or 'dual_lora_only'.")
        check_names(self)
        if self.ensure_weight_tying:  # filled in by the model, which knows what is tied
            self.modules_to_tie: set[str] | None = None
            self.target_modules_to_tie: set[str] | None = None
        check_frozen(self, get_args(Direction))
        self.form  # noqa: B018 - raises for unknown names
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str: list the module names instead, or "
                        "write the layers into the regular expression."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        lora_fields.note_alphas(self)
        self._complete = True

    def _check_start(self) -> None:
        check_start(self)

    @property
    def starts_like_lora(self) -> bool:
        """Whether B is zero and A is drawn as LoRA draws it."""
        return self.init_weights is True or self.init_weights == "aligned"

    @property
    def one_group(self) -> bool:
        """Whether all of the rank is in A and B."""
        return self.direction_activation == "frozen"

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field and keep the others consistent: a new r1 or r2 changes `r`, a new start its warm-up."""
        if vars(self).get("_complete"):
            name, value = lora_fields.written(name, value, {f.name for f in fields(self)})
            lora_fields.keep_units(self, name, value)
        if not vars(self).get("_complete") or name not in CHECKED:
            super().__setattr__(name, value)
            return
        if name[0] != "r":
            tried = copy.copy(self)
            vars(tried).update({"_complete": False, name: value})
            if name == "init_weights" and value != self.init_weights:
                vars(tried)["warmup_steps"] = None
            tried._check_start()
            vars(self).update(vars(tried), _complete=True)
            return
        new = {"r1": self.r1, "r2": self.r2, name: value}
        if name == "r" and value != new["r1"] + new["r2"]:
            new["r1"], new["r2"] = split_rank(value, None, None, one_group=self.one_group)
        r1, r2 = split_rank(None, new["r1"], new["r2"], one_group=self.one_group)
        vars(self).update(r=r1 + r2, r1=r1, r2=r2)

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Use layers of the user's, {type of the base layer: DualLoraLayer subclass}, as LoraConfig does; not saved."""
        self._custom_modules = {**(self._custom_modules or {}), **mapping}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PeftConfig; raises ValueError if the adapter file next to the configuration was cut short."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_file(pretrained_model_name_or_path, subfolder)
        vars(config)[READ] = True
        return config

    @classmethod
    def paper(cls, *, warmup_steps: int | float = PAPER_WARMUP, **options: Any) -> DualLoraConfig:
        """The configuration with the paper's start: all factors from N(0, σ²), and λ from 0 to 1 over `warmup_steps`.

        warmup_steps: optimizer steps, or, below 1, a share of a Trainer's run, which `DualLoraCallback` tells.
        The other options are those of `DualLoraConfig`; `alpha` is 2 (r1 + r2) by default.
        """
        return cls(**{"ste": "clip"} | options | {"init_weights": "paper", "warmup_steps": warmup_steps})

    def default_alpha(self, r1: int, r2: int) -> float:
        """Return the default α for these ranks. It is the same for `init_weights=False`, before weights are loaded."""
        return (EARLIER_ALPHA if self.init_weights in ("paper", "zero") else ALPHA) * (r1 + r2)

    lora_alpha = property(
        lora_fields.lora_alpha,
        doc="LoRA's `lora_alpha` at equal strength; where each layer has its own default, that of `r`.",
    )
    lora_dropout = property(lambda self: self.dropout, doc="`dropout` for code that knows LoRA.")

    @property
    def form(self) -> Form:
        """The member of the family that this configuration trains."""
        return Form(
            self.ste,
            self.magnitude_activation,
            self.direction_activation,
            live_zero=self.init_weights != "paper",
            plain=self.plain_rank,
        ).check()


def _accept_lora_fields(init: Any) -> Any:
    """Wrap the generated `__init__` to take LoRA's fields as well. (Fields of the class would be saved.)"""
    own = set(inspect.signature(init).parameters)

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **options: Any) -> None:
        if options.get("peft_type") and "format_version" not in options and "init_std" in options:
            options = upgrade_format_1(options)
        lora_fields.refuse_unknown(options, own)
        init(self, *args, **lora_fields.translate(options, own))

    signature = inspect.signature(init)  # from which PEFT takes the fields that a saved configuration may have
    theirs = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in lora_fields.names() - own]
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *theirs])  # type: ignore[attr-defined]
    return wrapped


def _docstring_with_fields(config: type) -> str:
    """Return the class's docstring with its fields, as PEFT's own classes have them, from the fields' help texts."""
    lines = [
        f"    {f.name} (`{f.type}`, default {f.default if f.default_factory is MISSING else f.default_factory()!r}): "
        f"{f.metadata['help']}"
        for f in fields(config)
        if f.name in vars(config)["__annotations__"]
    ]
    return "\n".join([inspect.cleandoc(config.__doc__ or ""), "", "Args:", *lines])


DualLoraConfig.__init__ = _accept_lora_fields(DualLoraConfig.__init__)  # type: ignore[method-assign]
DualLoraConfig.__doc__ = _docstring_with_fields(DualLoraConfig)
