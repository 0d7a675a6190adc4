"""The official prompt templates and negative prompt, taken from diffusers and checked by hash.

The texts are not part of this project: they are read from the installed diffusers, brought to the wording the
models were trained with (one word is spelt "promt" there), and compared with known hashes, so that a changed
diffusers is noticed instead of shifting every embedding.

`python -m kandinsky5.prompt_templates FILE` saves them for `--prompt_templates FILE`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from modules.errors import ConfigError, ResourceError
from modules.files import write_json
from modules.parsing import parse_json

ContentType = Literal["video", "image"]
"""Which template a caption goes through: clips of one frame take `image`, longer ones `video`."""

_PLACE = "{}"
_SHA256 = {
    "video": "09efacd0c7584e236b605dfa1d8b76e87051f5d4ca99f79243e46cbec993c3bc",
    "image": "04de998d6e835997641241c6d0ec3dc0fab9e8c70f87dccf98333822ccdff04f",
    "negative_prompt": "0c7acab80fec7c0fc9195770616e90570e9a33cb4a1826f11a65215582119e82",
}


@dataclass(frozen=True, slots=True)
class PromptTemplates:
    """The templates that the models were trained with, byte for byte."""

    video: str
    image: str
    """Chat templates with one place `{}` for the caption."""
    negative_prompt: str
    """The official default for video."""

    def parts(self, content: ContentType) -> tuple[str, str]:
        """The text before and after the caption."""
        before, _, after = (self.video if content == "video" else self.image).partition(_PLACE)
        return before, after


def load_prompt_templates(file: Path | None = None) -> PromptTemplates:
    """The templates from the installed diffusers, or from a file that `save_prompt_templates` wrote.

    Raises:
        ConfigError: `file` cannot be used.
        ResourceError: the installed diffusers has other texts.
    """
    if file is not None:
        texts, origin = _read_file(file), f"--prompt_templates {file}"
    else:
        texts, origin = _read_diffusers()
    wrong = [name for name, digest in _SHA256.items() if _sha256(texts.get(name, "")) != digest]
    if not wrong:
        return PromptTemplates(**texts)
    what = (
        f"{origin}: {' and '.join(wrong)} is not the text that Kandinsky 5 was trained with "
        "(its SHA-256 differs)"
    )
    if file is not None:
        raise ConfigError(what)
    raise ResourceError(
        f"{what}\nInstall the tested version: pip install 'diffusers>=0.42,<0.43'. Or save the texts where "
        "that version is installed, with python -m kandinsky5.prompt_templates FILE, and give "
        "--prompt_templates FILE"
    )


def save_prompt_templates(file: Path, templates: PromptTemplates) -> None:
    """Write the templates for `--prompt_templates`."""
    write_json(file, asdict(templates))


def _read_file(file: Path) -> dict[str, str]:
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompt_templates {file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ConfigError(f"--prompt_templates {file}: must be a JSON table of texts: {', '.join(_SHA256)}")
    return {name: content.get(name, "") for name in _SHA256}


def _read_diffusers() -> tuple[dict[str, str], str]:
    """The three texts, "" for what is not found, and where they come from."""
    try:
        import diffusers
        from diffusers.pipelines.kandinsky5 import pipeline_kandinsky
        from diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i import Kandinsky5T2IPipeline
    except ImportError as error:
        raise ResourceError(
            f"the prompt templates are read from diffusers, which cannot be imported ({error}). "
            "Install the tested version: pip install 'diffusers>=0.42,<0.43'"
        ) from error
    quoted = re.search(r'negative_prompt\s*=\s*"([^"]*)"', pipeline_kandinsky.EXAMPLE_DOC_STRING)
    texts = {
        "video": _template_of(pipeline_kandinsky.Kandinsky5T2VPipeline),
        "image": _template_of(Kandinsky5T2IPipeline),
        "negative_prompt": quoted.group(1) if quoted else "",
    }
    return texts, f"diffusers {diffusers.__version__}"


def _template_of(pipeline_class: Any) -> str:
    """A pipeline's template in the official spelling; the template is set by its constructor alone."""
    components = [name for name in inspect.signature(pipeline_class.__init__).parameters if name != "self"]
    pipeline = pipeline_class(**dict.fromkeys(components))
    return pipeline.prompt_template.replace("prompt engineer", "promt engineer")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
