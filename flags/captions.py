"""The flags for where captions come from, shared by several commands."""

from typing import Any

from pydantic import Field

from flags.parse import Flags
from flags.types import CaptionFrom, Words


class CaptionFlags(Flags):
    """The base class for the flags of commands that read captions."""

    caption_from: CaptionFrom = Field(
        "auto",
        description="auto = for each recording the first that exists: NAME.txt, NAME.json, a row "
        "of metadata.csv or metadata.jsonl; tags = the files' own title, artist, genre, comment",
    )
    caption: Words | None = Field(None, description="one caption for all recordings; None = off")
    no_label: bool = Field(False, description="use empty captions and read none")

    @property
    def captions(self) -> dict[str, Any]:
        """The arguments that tell recordings/scan.py where to find captions."""
        return {
            "with_captions": not self.no_label,
            "caption": self.caption,
            "from_tags": self.caption_from == "tags",
        }

    def _problems(self) -> list[str]:
        return [
            *self._excluded("no_label", "caption_from", "caption"),
            *self._excluded("caption", "caption_from"),
        ]
