"""What a VLM is asked, and which of its attention becomes a map. No torch."""
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from common.files import join_some, read_json
from config import UserError

# Which rows of attention make a map: those of the question's words, those that predict the tokens
# of the answer (each is the row of the token before), or those of the answer's tokens.
KINDS = ("question", "predict", "answer")

# A phenomenon as something visible, never as a law: attention goes to what can be seen.
CUES = {
    "collision": "the objects at the point where they hit each other",
    "rigid body motion": "the solid object that moves without changing its shape",
    "elastic motion": "the object that bounces, stretches or springs back",
    "liquid motion": "the liquid that pours, flows or splashes",
    "gas motion": "the smoke, steam or mist that drifts",
    "deformation": "the object that is bent, pressed or squeezed",
    "melting": "the solid that turns into drops and puddles",
    "solidification": "the liquid that becomes hard or freezes",
    "vaporization": "the liquid that boils, with bubbles and steam",
    "liquefaction": "the droplets that form on a cold surface",
    "explosion": "the blast, the flash and the flying pieces",
    "combustion": "the flames and what they burn",
    "reflection": "the mirror image or the beam that is thrown back",
    "refraction": "the object or beam that looks bent through glass or water",
    "scattering": "the haze, beam or glow of scattered light",
    "interference and diffraction": "the coloured bands and rings of light",
    "unnatural light source": "the lamp, laser or screen that shines",
}


class VLMError(UserError):
    """The VLM, a video or a question cannot be used. A command may go on with the next video."""


@dataclass(frozen=True)
class Settings:
    """How to ask, and how to read attention.

    A VLM's folder may hold other values in a teacher.json, as that of the tiny VLM does.
    """
    question: str = ("Describe the {name} in this video: {cue}. Say what it is and where it "
                     "happens, in one sentence.")
    background: str = ("Describe the background of this video: the scene behind everything that "
                       "moves. Say what it is and where it is, in one sentence.")
    answer: str = ""  # such as "{name}": read attention at this answer, 5 to 70 times cheaper
    words: int = 64  # tokens of an answer, at most
    rows: str = "predict"  # question | predict | answer
    layers: str = ""  # first-last, counted from 0; empty = from L // 2 to before 4 L // 5
    # Some tokens draw attention whatever is asked ("sinks"). A map is cut at this quantile of its
    # own values, which tames them.
    sinks: float = 1.0

    def question_for(self, name: str) -> str:
        """The question for a phenomenon."""
        return self.question.format(name=name, cue=CUES.get(name, name))

    def answer_for(self, name: str) -> str:
        """The answer that stands in for the VLM's own, where `answer` is set."""
        return self.answer.format(name=name)


def read_settings(folder: Path, n_layers: int, given: dict) -> Settings:
    """The defaults, then the folder's teacher.json, then what is given and not None; what is given
    under other names is passed over.

    n_layers: of the VLM. Raises UserError with the first broken rule.
    """
    path = folder / "teacher.json"
    found = read_json(path) if path.exists() else {}
    types = typing.get_type_hints(Settings)
    odd = [name for name, value in found.items() if type(value) is not types.get(name)]
    if odd:
        raise UserError(f"{path} has settings that are unknown or of another type: "
                        f"{join_some(sorted(odd))}.")
    found |= {name: given[name] for name in types if given.get(name) is not None}
    settings = Settings(**found)
    if settings.rows not in KINDS:
        raise UserError(f"--rows must be one of {', '.join(KINDS)}, not {settings.rows!r}.")
    try:
        settings.question_for("combustion")
        settings.answer_for("combustion")
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
        raise UserError("--question has a place for {name} and {cue}, --answer for {name}, not "
                        f"{e}.") from None
    if not 0 < settings.sinks <= 1 or settings.words < 1:
        raise UserError("--sinks is a quantile above 0 and up to 1, and --words at least 1.")
    layers_of(settings.layers, n_layers)
    return settings


def layers_of(text: str, n: int) -> list[int]:
    """The layers that `Settings.layers` names, of n. Raises VLMError."""
    if not text:
        return list(range(n // 2, max(4 * n // 5, n // 2 + 1)))
    if re.fullmatch(r"\d+(-\d+)?", text):
        ends = [int(end) for end in text.split("-")]
        if ends[0] <= ends[-1] < n:
            return list(range(ends[0], ends[-1] + 1))
    raise VLMError(f"--layers is first-last, from 0 to {n - 1} here, not {text!r}.")
