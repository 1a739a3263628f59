"""DualLoraModel: finds the layers, puts the adapters on them, saves and loads the warm-up's count."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from peft.tuners.lora import LoraModel
from peft.tuners.lora.model import _adapter_names_pre_forward_hook as with_adapter_names
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
)
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from .._warning import warn
from ..core import decompositions  # noqa: F401 - so that torch.onnx.export finds them
from . import diffusers_files, lora_fields, merge_checks, saved, weighted
from .config import DualLoraConfig
from .fused_experts import target_fused_experts
from .layer import DualLoraLayer, dispatch_default, layers_of, named_layers
from .layers.attention import MultiheadAttention
from .layers.conv import Conv1d, Conv2d, Conv3d
from .layers.embedding import Embedding
from .layers.experts import ParamWrapper
from .layers.quantized import dispatch_quantized
from .layers.quantized_rows import keep_unpacked
from .layers.read import READ_LAYERS, ReadLayer, is_read, set_fast_paths
from .patterns import explained_targets, layer_options, token_share
from .shared import Shared
from .watch_training import Watch

LAYERS: dict[type[nn.Module], type[DualLoraLayer]] = {
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.MultiheadAttention: MultiheadAttention,
}


def _names_of_modules(module: nn.Module) -> Iterator[str]:
    """Yield the names of all child modules, without the dicts inside adapted layers, whose keys are adapters."""
    own = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    for name, child in module.named_children():
        if not (own and isinstance(child, nn.ModuleDict | nn.ParameterDict)):
            yield name
            yield from _names_of_modules(child)


class DualLoraModel(BaseTuner):
    """A model with Dual LoRA adapters, as `peft.get_peft_model(model, DualLoraConfig(…))` makes it.

    Dual LoRA (Xu et al., arXiv 2512.03402): W + λ · α/√(r1 r2) · ReLU(B A) ⊙ Sign(D C).
    """

    peft_config: dict[str, Any]
    prefix: str = "dual_lora_"
    tuner_layer_cls = DualLoraLayer  # type: ignore[assignment]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # Which modules follow the embedding that they are tied to, and the replication of layers: as PEFT does it for LoRA.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie
    _add_targets_to_tie = LoraModel._add_targets_to_tie
    _prepare_model = LoraModel._prepare_model  # type: ignore[assignment]

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """As PEFT's, but with the names from before the first adapter; else a further adapter would tie nothing."""
        return [name.removesuffix(".base_layer") for name in super()._get_module_names_tied_with_embedding()]

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(peft_config, model, target_name)
        _check_lora_target_modules_mamba(SimpleNamespace(peft_type="LORA"), model, target_name)  # type: ignore[arg-type]

    def _check_new_adapter_config(self, config: DualLoraConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            theirs = set(other.target_parameters or ())
            if wanted and theirs and theirs != wanted:
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(wanted)} for the new adapter and "
                    f"{sorted(theirs)} for adapter '{name}': the nesting of the "
                    "wrappers decides to which parameter a saved factor belongs."
                )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, except for TRL's frozen reference: an adapter "ref" starts as a copy of "default".

        TRL's trainers add "ref" to a model that already has an adapter. They then copy the weights with ".default." in
        their names, as LoRA's have. Names of our factors end in ".default", so TRL would copy nothing.
        """
        if len(self.peft_config) > 1 and (taken := set(self.peft_config) & {"model", *_names_of_modules(model)}):
            raise ValueError(
                f"Of several adapters none can be called {sorted(taken)[0]!r}, because a module of this model has that "
                "name: the files of the other adapters would lack layers. Choose another name."
            )
        is_reference = adapter_name == "ref" and self.peft_config["ref"] is self.peft_config.get("default")
        lora_fields.warn_of_entered(self.peft_config[adapter_name])
        target_fused_experts(self.peft_config[adapter_name], model)
        with explained_targets(self.peft_config[adapter_name], model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        keep_unpacked(model)
        set_fast_paths(model)
        merge_checks.warn_of_second_names(model)
        if not self.peft_config[adapter_name].inference_mode:
            Watch(adapter_name, layers_of(self.model, adapter_name))
        if is_reference:
            for layer in layers_of(self.model, "default"):
                weighted.copy_factors(layer, "default", adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        known = self.target_module_mapping.get(model_config.get("model_type", ""))
        if peft_config.target_modules is None and known is None and peft_config.target_parameters:
            return peft_config  # parameters alone
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: DualLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, MultiheadAttention):
            return  # its output projection, which it adapts itself
        r1, r2, alpha = layer_options(config, current_key)
        share = token_share(config, current_key)
        key = current_key if parameter_name is None else f"{current_key}.{parameter_name}"
        layer: Any = target
        wrapped = isinstance(target, ParamWrapper) and target.parameter_name != parameter_name
        if isinstance(target, DualLoraLayer) and not wrapped:
            target.update_layer(adapter_name, r1=r1, r2=r2, alpha=alpha, share=share, key=key, config=config)
        else:
            shared = vars(self).setdefault("_shared", Shared())
            options: dict[str, Any] = {"r1": r1, "r2": r2, "alpha": alpha, "share": share, "key": key, "shared": shared}
            options |= get_quantization_kwargs(self.model)
            if parameter_name is not None:
                options["parameter_name"] = parameter_name
                if is_read(self.model, module := current_key.removesuffix(f".{parameter_name}"), target):
                    raise ValueError(
                        f"{current_key!r} is read by a module above it, past the call in which an update of a single "
                        f"parameter acts. Name the module {module!r} in `target_modules` instead."
                    )
            if is_read(self.model, current_key, target):
                layer = READ_LAYERS[type(target)](target, adapter_name, config=config, **options)
            else:
                layer = self._create_new_module(config, adapter_name, target, **options)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter does not train before it is chosen
            self._replace_module(parent, target_name, layer, target)
        if target_name in (getattr(config, "target_modules_to_tie", None) or ()):
            layer.tie(adapter_name, cast(Any, self.model).get_input_embeddings())

    @staticmethod
    def _create_new_module(config: DualLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        for kind, layer in (config._custom_modules or {}).items():
            if isinstance(base, kind):
                if not kind.__module__.startswith("torch."):
                    warn(f"Unsupported layer type '{type(base)}' encountered, proceed at your own risk.", stacklevel=2)
                return layer(target, adapter_name, config=config, **kwargs)
        if "parameter_name" in kwargs:
            return ParamWrapper(target, adapter_name, config=config, **kwargs)
        for kind, layer in LAYERS.items():
            if isinstance(base, kind):
                return layer(target, adapter_name, config=config, **kwargs)
        for dispatch in (dispatch_quantized, dispatch_default):
            new = dispatch(base, target, adapter_name, config=config, **kwargs)
            if new is not None:
                return new
        raise ValueError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, "
            "transformers.pytorch_utils.Conv1D, torch.nn.MultiheadAttention. Leave it out of `target_modules`, or name "
            "it in `exclude_modules`."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also writes the child's weight to the new module, which not every kind of layer can take, and the
        # device is where `update_layer` has put the factors already.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if not autocast_adapter_dtype:
            warn(
                "autocast_adapter_dtype=False has no effect on Dual LoRA: its factors are fp32 whatever the base's "
                "dtype, because bf16 factors flip signs and change ΔW by 4.6 %.",
                stacklevel=3,
            )
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self, merge: bool = True, *, adapter_names: list[str] | None = None, **options: Any
    ) -> Any:
        if merge:
            merge_checks.refuse_shared_weights(self, adapter_names)
            for name in adapter_names or self.active_adapters:
                merge_checks.warn_unfinished(name, self.peft_config[name], named_layers(self.model, name))
            merge_checks.refuse_unmergeable(self, adapter_names, bool(options.get("safe_merge")))
        layers = merge_checks.quantised_layers(self.model)  # of the others none is held while they go
        model: Any = super()._unload_and_optionally_merge(merge, adapter_names=adapter_names, **options)
        if merge:
            merge_checks.warn_of_rounding(layers)
        set_fast_paths(model)
        return model

    # A mixed batch: the argument `adapter_names` of the model's forward reaches every adapted layer.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in layers_of(self) for name in layer.states}
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. Loaded: "
                f"{', '.join(sorted(known))}."
            )
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        inside = {id(m.out_projection) for m in self.modules() if isinstance(m, MultiheadAttention)}
        with ExitStack() as hooks:
            for read in (m for m in self.modules() if isinstance(m, ReadLayer) and id(m) not in inside):
                read.takes_no_reads = True
                hooks.callback(setattr, read, "takes_no_reads", False)
            for module in self.modules():
                if isinstance(module, DualLoraLayer | AuxiliaryTrainingWrapper):
                    names = adapter_names if module in in_encoder else repeated
                    hook = partial(with_adapter_names, adapter_names=names)
                    hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base; where a layer refuses (`safe_merge`), no layer is merged.

        Exactly; into quantised layers as closely as they allow, which is then said.
        """
        merge_checks.refuse_shared_weights(self, adapter_names)
        before = [(layer, list(layer.merged_adapters)) for layer in layers_of(self)]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ValueError:
            for layer, names in before:
                added = [name for name in layer.merged_adapters if name not in names]
                if added:
                    layer.unmerge(added)
            raise
        merge_checks.warn_of_rounding(merge_checks.quantised_layers(self.model))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **kwargs: Any,
    ) -> None:
        """A copy of one adapter at another strength: ΔW' = w ΔW, by B' = |w| B and, for w < 0, D' = -D.

        Modules and tokens that it trains besides are copied as they are.

        ReLU and Sign are not linear, so a sum of several ΔW is no Dual LoRA update; the error says what to do instead.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"There is already an adapter {adapter_name!r}, which would be replaced: choose another name, or call "
                f"`delete_adapter({adapter_name!r})` first."
            )
        source, weight = weighted.checked_source(self.model, self.peft_config, adapters, weights, combination_type)
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[source])
        self.peft_config[adapter_name].inference_mode = False
        try:
            self.inject_adapter(self.model, adapter_name)
            weighted.copy_scaled(self.model, source, weight, adapter_name)
        except Exception:  # such as a name that a module has
            for layer in layers_of(self.model, adapter_name):
                layer.delete_adapter(adapter_name)
            del self.peft_config[adapter_name]
            raise

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        _unmerge(model, kwargs.get("state_dict") or (args[0] if args else {}))
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        layers = named_layers(model, adapter_name)
        for name, layer in layers.items():
            diffusers_files.note_alpha(state.get(f"{name}.dual_lora_B.{adapter_name}"), layer, adapter_name)
        saved.refuse_empty(state, adapter_name)
        saved.warn_if_not_gathered(state, adapter_name)
        saved.warn_of_nan(state, adapter_name, "saved")
        saved.warn_of_scales([*layers.values()], adapter_name)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layers, state = named_layers(model, adapter_name), saved.with_prefix(state_dict, model)
        state = saved.with_counts(state, layers, config, adapter_name)
        saved.warn_if_unfinished({n: t for n, t in state.items() if n.endswith(".dual_lora_left")}, config)
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state)
        state = cls._named_as_in(model, adapter_name, state)
        saved.check_fits(model, config, adapter_name, state)
        saved.warn_of_nan(state, adapter_name, "loaded")
        return saved.without_mismatched_layers(model, adapter_name, state)

    @classmethod
    def _named_as_in(cls, model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state with the model's own names, in case its `state_dict` method was replaced.

        PEFT takes the names from that method, and would load nothing, without an error.
        """
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        own = {cls._remove_adapter_name_from_key(n, adapter_name): n for n, _ in held if ".dual_lora_" in n}
        return {own.get(name, name): value for name, value in state.items()}


def _unmerge(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the original weights of merged layers into a model's state, from which PEFT saves embeddings."""
    merged = {
        id(parameter): layer.original_weights[part]
        for layer in layers_of(model)
        if layer.merged and layer.original_weights is not None
        for part, parameter in layer.merge_parameters().items()
    }
    if not merged:
        return
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied one more than once
        original = merged.get(id(parameter))
        if original is not None and name in state and state[name].shape == original.shape:
            state[name] = original
