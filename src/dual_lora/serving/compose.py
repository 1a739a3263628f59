"""A checkpoint's weights as an inference server reads them, with an adapter composed in on the way.

A server holds plain weights. What is read for an adapted module comes out as W + ΔW, one tensor after the other: never
is more than one composed weight in memory with the model. Every PEFT method that has a merge works, by its own merge.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dual_lora.verify.numbers import all_finite
from dual_lora.verify.own_code import not_asked
from dual_lora.verify.parts import check_parts

from .files import AdapterError, Shapes, check_before_loading, check_shapes, first_line, method_of, shapes_of

Stream = Iterable[tuple[str, Tensor]]
_FLOATING = {torch.float32, torch.bfloat16, torch.float16}


class ComposedWeights:
    """An adapter, opened once against a model's configuration; `stream` composes it into that model's weights.

    Args:
        config: the base model's transformers configuration, or the folder that holds it.
        adapter: folder with `adapter_config.json` and `adapter_model.safetensors`.
        device: where products are computed. Weights come out on the device that they came in.

    Raises:
        AdapterError: the adapter is missing, half-written, not finite, made for another model, or no method that has a
            merge; the message says what to do.
    """

    def __init__(self, config: Any, adapter: str | Path, device: str | torch.device = "cpu"):
        self.folder, self.device = Path(adapter), torch.device(device)
        files, on_meta = shapes_of(self.folder), _meta_model(config)
        with _training_defaults():
            method = method_of(self.folder)
            check_before_loading(copy.deepcopy(on_meta), self.folder, copy.deepcopy(method), files)
        self._model = _without_weights(on_meta)
        self._prefix = getattr(self._model, "base_model_prefix", "")
        self._shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        shared = _names_of_shared(self._model)
        with _training_defaults():
            peft_model = _adapted(self._model, self.folder, method, files, self.device)
        self._layers = _layers(peft_model)
        self._trained = _whole_parameters(peft_model, self._shapes.keys() - self._layers.keys())
        self._refuse_shared(shared)
        self._check_each_kind()

    @property
    def names(self) -> set[str]:
        """The base model's parameters that the adapter changes."""
        return {*self._layers, *self._trained}

    def changes(self, name: str) -> bool:
        """Whether the adapter changes the weight that a checkpoint has under this name."""
        return self._own_name(name) in self.names

    def check(self, checkpoint: Mapping[str, tuple[tuple[int, ...], bool]]) -> None:
        """Raise AdapterError unless the checkpoint holds every adapted weight in the shape of the model.

        checkpoint: for each tensor's name its shape and whether it is floating-point; `checkpoint_of` reads it.
        """
        own = {self._own_name(name): about for name, about in checkpoint.items()}
        missing = sorted(self.names - own.keys())
        if missing:
            raise AdapterError(self._not_found(missing))
        for name in sorted(self.names):
            shape, floating = own[name]
            self._check_tensor(name, shape, floating)

    def stream(self, weights: Stream) -> Iterator[tuple[str, Tensor]]:
        """Yield the same names with composed weights for adapted modules. weights: name and whole tensor, as on disk.

        Raises AdapterError at its end if an adapted weight was not among them: no layer is left out in silence.
        """
        left = set(self.names)
        for name, tensor in weights:
            own = self._own_name(name)
            if own in self.names:
                self._check_tensor(own, tuple(tensor.shape), tensor.dtype in _FLOATING)
            if own in self._trained:
                tensor = self._finite(own, self._trained[own].to(tensor.device, tensor.dtype))
            elif own in self._layers:
                with _training_defaults():
                    tensor = self._finite(own, self._composed(own, tensor))
            left.discard(own)
            yield name, tensor
        if left:
            raise AdapterError(self._not_found(sorted(left)))

    def _composed(self, own: str, tensor: Tensor) -> Tensor:
        layer = self._layers[own]
        plain = layer.get_base_layer()
        own_weight, bias = plain.weight, getattr(plain, "bias", None)
        if not isinstance(own_weight, _Absent):  # embeddings that were saved with the adapter
            tensor = own_weight.detach().to(tensor.device, tensor.dtype)
        plain.weight = nn.Parameter(
            tensor.to(self.device, copy=True),  # some methods merge in place
            requires_grad=False,
        )
        if bias is not None:  # ones, which neither a sum nor a product (IA3's) leaves as they are
            plain.bias = nn.Parameter(torch.ones(bias.shape, device=self.device), requires_grad=False)
        layer = copy.copy(layer)  # what a merge keeps, as the original weight, goes with the copy
        layer.merged_adapters = []
        try:
            layer.merge(safe_merge=True)
            merged = plain._parameters["weight"]
            if merged is None or layer.get_base_layer() is not plain:
                raise AdapterError(f"{self.folder} replaces {own}: merge it and serve the merged folder.")
            if bias is not None and torch.any(plain.bias != 1):
                raise AdapterError(f"{self.folder} changes biases as well: merge it and serve the merged folder.")
            return merged.detach().to(tensor.device, tensor.dtype)
        except AdapterError:
            raise
        except Exception as error:  # whatever a method has against being merged
            raise AdapterError(f"{self.folder} cannot be merged into {own}: {first_line(error)}.") from error
        finally:
            plain._parameters["weight"] = own_weight
            if bias is not None:
                plain.bias = bias

    def _check_each_kind(self) -> None:
        """Compose into one weight of ones for each kind of layer, so that what has no merge is refused at once."""
        kinds: dict[Any, str] = {}
        for own in sorted(self._layers, key=lambda own: -math.prod(self._shapes[own])):  # the smallest stays
            layer = self._layers[own]
            plain = layer.get_base_layer()
            kinds[type(layer), type(plain), getattr(plain, "bias", None) is None] = own
        with _training_defaults():
            for own in kinds.values():
                ones = torch.ones(self._shapes[own], dtype=self._layers[own].get_base_layer().weight.dtype)
                self._finite(own, self._composed(own, ones))

    def _finite(self, own: str, tensor: Tensor) -> Tensor:
        if not all_finite(tensor):
            raise AdapterError(
                f"{own} with {self.folder} is beyond what {tensor.dtype} holds, or computed from the base's weights as "
                "they were when the adapter was made: merge it and serve the merged folder."
            )
        return tensor

    def _own_name(self, name: str) -> str:
        """A checkpoint's name as the model has it: some checkpoints were saved without the head's prefix, or with."""
        if name in self._shapes:
            return name
        longer, shorter = f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")
        return longer if longer in self._shapes else shorter if shorter in self._shapes else name

    def _check_tensor(self, name: str, shape: tuple[int, ...], floating: bool) -> None:
        if not floating:
            raise AdapterError(
                f"{name} is quantised in the base model's checkpoint, and {self.folder} changes it: merge the adapter "
                "into the unquantised model and quantise the result, or serve the unquantised base."
            )
        if shape != self._shapes[name]:
            raise AdapterError(
                f"{name} has the shape {shape} in the checkpoint and {self._shapes[name]} in the model that its "
                "configuration describes: is this adapter's base another model?"
            )

    def _not_found(self, missing: list[str]) -> str:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return (
            f"{self.folder} changes {some}, which the base model's checkpoint does not hold under that name (quantised "
            "and fused weights have other names): merge the adapter and serve the merged folder."
        )

    def _refuse_shared(self, shared: set[str]) -> None:
        changed = sorted(self.names & shared)
        if changed:
            raise AdapterError(
                f"{self.folder} changes {', '.join(changed)}, which the base model uses twice (input and output "
                "embeddings are one weight): merge the adapter and serve the merged folder."
            )


@contextmanager
def _training_defaults() -> Iterator[None]:
    """Set torch's usual defaults: servers load weights in inference mode and with half precision as the default type; a
    merge knows neither."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)


def _names_of_shared(model: nn.Module) -> set[str]:
    """All names of parameters that have more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _meta_model(config: Any) -> nn.Module:
    import transformers

    try:
        if isinstance(config, str | Path):
            config = transformers.AutoConfig.from_pretrained(str(config), trust_remote_code=False)
        check_parts(config.to_dict())
        name = (config.architectures or ["none"])[0]
        with not_asked(), torch.device("meta"):
            model = getattr(transformers, name)._from_config(config)
    except Exception as error:  # no such file or class, code of the model's own, values that the class can't have
        raise AdapterError(
            f"The base model's config.json describes no model of transformers: {first_line(error)}."
        ) from error
    return model


def _without_weights(model: nn.Module) -> nn.Module:
    """The model with absent weights on a real device instead of those on the meta device."""
    shared: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = shared.setdefault(id(parameter), _absent_like(parameter))
    return model


class _Absent(nn.Parameter):
    """A weight of the base model that is not here: its shape and precision on a real device, and one number: NaN.

    So what a method computes from it (the start of PiSSA, OLoRA, PSOFT, OSF) can't pass for a weight.
    """


def _absent_like(parameter: Tensor) -> nn.Parameter:
    one = torch.full((), torch.nan, dtype=parameter.dtype).expand(parameter.shape)
    return _Absent(one, requires_grad=False)


def _adapted(model: nn.Module, folder: Path, config: Any, files: Shapes, device: torch.device) -> Any:
    """The PEFT model with the adapter's tensors, which are read here and nowhere else."""
    from peft import PeftModel, get_peft_model_state_dict

    on_meta = config.peft_type != "ADALORA"  # its ranks may be cut while it is loaded, which needs numbers
    try:
        adapted: Any = PeftModel.from_pretrained(
            model, str(folder), config=config, low_cpu_mem_usage=on_meta, torch_device=str(device)
        )
    except Exception as error:  # whatever a foreign file makes PEFT raise
        raise AdapterError(f"{folder} does not fit the base model: {first_line(error)}.") from error
    check_shapes(adapted, folder, files)
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    wrong = sorted(
        n for n in files.keys() & loaded.keys() if loaded[n].is_floating_point() and not all_finite(loaded[n])
    )
    if wrong:
        raise AdapterError(f"{folder} holds NaN or infinite numbers, in {wrong[0]} and {len(wrong) - 1} more tensors.")
    return adapted.eval()


def _layers(adapted: Any) -> dict[str, Any]:
    """Return the PEFT layer that composes each adapted weight, by the weight's name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {}
    for name, module in adapted.base_model.model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module, "get_base_layer"):
            continue
        plain = module.get_base_layer()
        own = name.replace(".base_layer", "").removesuffix(".token_adapter")
        if "weight" not in plain._parameters or not hasattr(module, "merge"):
            raise AdapterError(f"{own} ({type(plain).__name__}) has no one weight: merge and serve the merged folder.")
        if f"{own}.weight" in layers:
            raise AdapterError(f"{own} is adapted twice: merge the adapter and serve the merged folder.")
        layers[f"{own}.weight"] = module
    return layers


def _whole_parameters(adapted: Any, names: set[str]) -> dict[str, Tensor]:
    """Parameters that the adapter brings whole, by name: those of `modules_to_save`, and trained biases."""
    from peft.utils.other import ModulesToSaveWrapper

    model = adapted.base_model.model
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        own = name.replace(".base_layer.", ".")
        if own in names and not isinstance(parameter, _Absent):
            found[own] = parameter.detach()
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            whole = module.modules_to_save["default"]
            found |= {f"{name}.{key}": tensor.detach() for key, tensor in whole.named_parameters()}
    return found
