"""What turns the rows of a run into tokens and pixels: the tokenizer, or for a model that sees images its processor."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils.hub import cached_file

from dpofast.data.images.prompt_images import PromptImages, with_template
from dpofast.model.checks.images import images_refused
from dpofast.model.parts import base_causal_lm
from dpofast.model.vision.families import family_of
from dpofast.model.vision.inputs import vision_inputs
from dpofast.training.config import DPOConfig

# One of them lies beside every model that has a tokenizer, and beside every one that has a processor of images.
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_OF_THE_HUB = ("revision", "token", "cache_dir", "subfolder")
WITHOUT_IMAGES = "To go on without images, remove their columns (dataset.remove_columns)"


class Processing(NamedTuple):
    """What a run's rows are read with.

    whole is what is saved beside the model, a processor or a tokenizer; tokenizer reads text. Both may be None, for
    data that is token ids. images makes token ids and pixels of prompts with images; where it is None, refused says
    why data with images cannot be used.
    """

    whole: Any
    tokenizer: Any
    images: PromptImages | None
    refused: str | None


def processing_of(whole: Any, failure: str | None, model: Any, ref_model: Any) -> Processing:
    """What reads the rows of a run.

    Args:
        whole: processing_class, or what processing_beside returned.
        failure: why the processor beside the model could not be loaded, or None.
        model: the policy, with the log-prob head attached.
        ref_model: a separate reference, likewise, or None.
    """
    processor = whole if isinstance(whole, ProcessorMixin) else None
    tokenizer = whole if processor is None else with_template(processor)
    refused = images_refused(model)
    if refused is None and processor is None:
        found = "no processor" if whole is None else f"a tokenizer alone ({type(whole).__name__})"
        refused = (
            f"expected the model's processor to read images, got {found}: pass "
            f"processing_class=AutoProcessor.from_pretrained(...){'' if failure is None else f'; {failure}'}"
        )
    if refused is None and ref_model is not None:
        refused = _reference_refuses(model, ref_model)
    if refused is not None or processor is None:
        return Processing(whole, tokenizer, None, refused)
    inputs: Any = vision_inputs(model)
    return Processing(whole, tokenizer, PromptImages(processor, inputs), None)


def _reference_refuses(model: Any, ref_model: Any) -> str | None:
    if (reason := images_refused(ref_model)) is not None:
        return f"ref_model: {reason}"
    ours, theirs = (base_causal_lm(each).config.model_type for each in (model, ref_model))
    if ours != theirs:
        return f"ref_model: expected a model of the policy's type {ours}, which reads images as it does, got {theirs}"
    return None


def processing_beside(name: str | None, model: Any, args: DPOConfig, options: dict[str, Any]) -> tuple[Any, str | None]:
    """The processor that lies beside a model that takes images, else its tokenizer, else None: token ids need none.

    transformers would make an empty tokenizer up for a folder without its files, and Trainer would save it and set the
    model's special tokens by it. A processor may need packages that text does without (torchvision, for videos).

    Args:
        name: the model's folder or hub name, where it was given by one; None for the one in its config.
        model: the loaded model.
        args: the trainer's.
        options: from_pretrained's, of the model.

    Returns:
        The processor or tokenizer, and why a processor that is there could not be loaded.
    """
    config = base_causal_lm(model).config
    name = config.name_or_path if name is None else name
    if not name:
        return None, None
    hub: dict[str, Any] = {key: options[key] for key in _OF_THE_HUB if key in options}
    access: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **hub}
    failure = None
    if family_of(config) is not None and _is_beside(name, _PROCESSOR_FILES, hub):
        try:
            processor = AutoProcessor.from_pretrained(name, **access)
            if isinstance(processor, ProcessorMixin):
                return processor, None
            failure = f"beside the model lies a {type(processor).__name__}, which does not read text and images"
        except Exception as error:  # of any kind, as its parts are of several libraries
            told = " ".join(str(error).split())[:300]
            failure = f"the one beside the model could not be loaded: {type(error).__name__}: {told}"
    found = _is_beside(name, _TOKENIZER_FILES, hub)
    return (AutoTokenizer.from_pretrained(name, **access) if found else None), failure


def _is_beside(name: str, files: tuple[str, ...], hub: dict[str, Any]) -> bool:
    return any(
        cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
            **hub,
        )
        for file in files
    )
