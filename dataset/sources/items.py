"""Items of a dataset, used and skipped, and the reasons for skipping."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from dataset.media.files import Content
from modules.messages import visible_name

NO_CAPTION = "no caption"
CAPTION_NOT_UTF8 = "caption is not UTF-8"
CAPTION_UNREADABLE = "caption cannot be read"
MISSING_FILE = "no such file"
NAME_NOT_UTF8 = "file name is not UTF-8"
IS_FOLDER = "is a folder"
NOT_A_FILE = "is not a regular file"
UNKNOWN_FORMAT = "format is not read"
OTHER_CONTENT: dict[Content, str] = {
    "image": "is an image, in a dataset of videos: give its folder as image_directory",
    "video": "is a video, in a dataset of images",
}
"""By what the file is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceItem:
    """One image or video with its captions."""

    path: Path
    captions: tuple[str, ...]
    """At least one; each stripped of white space at both ends, and it may be empty."""
    base_name: str
    """The name its caches start with: no folder, no last extension."""
    is_frame_folder: bool = False
    """A video given as a folder of images, one per frame."""
    mask_path: Path | None = None
    """Its mask for the masked loss; None weights everything equally."""
    key: str = ""
    """Tells it from other media of the same file name: a `place_mark`."""

    @property
    def name(self) -> str:
        """How messages and the index name it: the base name, with the extension of a file."""
        return self.base_name if self.is_frame_folder else self.base_name + self.path.suffix


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedItem:
    """A skipped media item, with the reason."""

    name: str
    """As `SourceItem.name`: no folder."""
    reason: str
    """The kind of reason, the same for all items it applies to, to count by."""
    detail: str = ""
    """Detail of this item; contains no folder."""
    is_failure: bool = False
    """The file is broken, so the run ends with exit code 3 unless --skip_bad was given."""
    key: str = ""
    """The item's, see `SourceItem`; empty in indexes of older versions."""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{visible_name(self.name)}: {self.reason}{visible_name(detail)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceListing:
    """The contents of a dataset, in a fixed order."""

    items: tuple[SourceItem, ...]
    skipped: tuple[SkippedItem, ...]
    unmatched_masks: tuple[str, ...] = ()
    """Names of masks that belong to no item."""
    notes: tuple[str, ...] = ()
    """What was left out beside the media, and what looks like a mistake: log lines."""

    @property
    def found(self) -> int:
        """Media files seen, used or not."""
        return len(self.items) + len(self.skipped)

    @property
    def empty_captions(self) -> int:
        """Items used with nothing but empty captions."""
        return sum(not any(item.captions) for item in self.items)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: a name may hold other bytes, JSON half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def composed_name(name: str) -> str:
    """A name however its accents are coded: macOS writes them as characters of their own."""
    return unicodedata.normalize("NFC", name)
