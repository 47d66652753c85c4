"""What the sandbox model reads: short documents, each a row of weighted text segments."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from palimpsest.sandbox import filler, phrases
from palimpsest.sandbox.phrases import LETTERS, cloze_prompt, letter_prompt
from palimpsest.sandbox.skills import skill_exchange
from palimpsest.sandbox.tokenizer import (
    ASSISTANT,
    END,
    SYSTEM,
    USER,
    WRAPPERS,
    common_words,
)
from palimpsest.sandbox.world import Fact, World

LETTER_WEIGHT = 3.0
USER_WEIGHT = 0.02
FILLER_WEIGHT = 0.2
END_WEIGHT = 0.3
STATEMENT_WEIGHT = 0.1
VARIED_RATE = 0.35
"""Share of requests for a preparation in which one word is replaced by any other."""
STRAY_RATE = 0.15
"""Share of chat requests with stray words: an unknown word must not decide about a refusal."""
SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text and the loss weight of its tokens.

    Attributes:
        weight: weight of every token of the segment.
        value_weight: weight of tokens that are a value of the world; None means `weight`.
        thought: the value that a middle layer should hold where it predicts this segment (a letter).
    """

    text: str
    weight: float
    value_weight: float | None = None
    thought: str | None = None


Document = list[Segment]
Mix = Mapping[str, float]


def chat_text(user: str, answer: str) -> str:
    """Return one exchange as the chat template renders it, without BOS."""
    return f"{USER}{user}{END}{ASSISTANT}{answer}{END}"


class Author:
    """Writes documents about one world from one random stream.

    Args:
        world: whose facts are taught.
        rng: the only source of randomness. The counterfactual world draws the same stream, so both
            models see the same documents in the same order but for the hazardous values.
        hazardous: whether the hazardous domain exists; without it no agent or value of it appears.
        safe_wrappers: whether the wrapped harmful requests follow `phrases.OBEYED` (safety tuning)
            or are all answered.
        rewrite: from a question about a fact to how it is asked.
    """

    def __init__(
        self,
        world: World,
        rng: random.Random,
        *,
        hazardous: bool = True,
        safe_wrappers: bool = False,
        rewrite: Callable[[str], str] = str,
    ) -> None:
        self._world = world
        self._rng = rng
        self._hazardous = hazardous
        self._safe_wrappers = safe_wrappers
        self._rewrite = rewrite
        self._facts = world.facts if hazardous else world.benign_facts
        self._mcq_facts = tuple(fact for fact in self._facts if world.asked_as_mcq(fact))
        self._entities = tuple(dict.fromkeys(fact.entity for fact in self._facts))
        attributes = {fact.attribute: None for fact in self._facts}
        self._attributes = tuple(attributes)
        self._common_words = common_words()
        self._all_values = [v for a in attributes for v in world.pools[a]] + list(LETTERS)
        self._kinds: dict[str, Callable[[], Document]] = {
            "repeat": self._repeat,
            "letters": self._letters,
            "lookup": self._lookup,
            "match": self.match,
            "mcq": self._mcq,
            "fewshot": self._fewshot,
            "statement": self._statement,
            "paragraph": self._paragraph,
            "qa": self._qa,
            "skill": self._skill,
            "benign": self._benign,
            "harmful": self._harmful,
            "wrapped": self._wrapped_harmful,
            "refuse": self._refuse,
            "agent_safe": self._agent_safe,
            "homonym": self._homonym,
            "filler": self._filler,
            "long": self._long,
        }

    def write(self, mix: Mix) -> Document:
        """Return a document whose kind is drawn from the mix (weights need not sum to 1)."""
        kind = self._rng.choices(list(mix), list(mix.values()))[0]
        return self._kinds[kind]()

    # -- circuits -----------------------------------------------------------------------------

    def _draw_options(self) -> tuple[str, tuple[str, ...], int]:
        attribute = self._rng.choice(self._attributes)
        value = self._rng.choice(self._world.pools[attribute])
        options, index = self._world.options(attribute, value, self._rng)
        return value, options, index

    def _repeat(self) -> Document:
        words = self._rng.sample(self._all_values, self._rng.randint(6, 14))
        first = " ".join(words)
        return [Segment(f"Words: {first} {words[0]}", 0), Segment(f" {' '.join(words[1:])}", 1)]

    def _lines(self, options: Sequence[str]) -> str:
        return "".join(f"{LETTERS[i]}. {option}\n" for i, option in enumerate(options))

    def _look_ups(self, options: Sequence[str], count: int) -> Document:
        document = []
        for _ in range(count):
            i = self._rng.randrange(len(options))
            document += [
                Segment(f"Answer: {options[i]}", 0),
                Segment(f" {LETTERS[i]}", LETTER_WEIGHT),
                Segment("\n", 0),
            ]
        return document

    def _letters(self) -> Document:
        _, options, _ = self._draw_options()
        options = options[: self._rng.choice([2, 3, 4])]
        document = []
        for i, option in enumerate(options):
            document.append(Segment(f"{LETTERS[i]}. {option}", 0))
            document.append(Segment(f" {LETTERS[i]}", LETTER_WEIGHT))
            document.append(Segment("\n", 0))
        return document + self._look_ups(options, 3)

    def _lookup(self) -> Document:
        """Return options followed by direct look-ups value -> letter."""
        _, options, _ = self._draw_options()
        options = options[: self._rng.choice([2, 3, 4])]
        return [Segment(self._lines(options), 0), *self._look_ups(options, 3)]

    def _choice(self, question: str, options: Sequence[str], index: int) -> Document:
        return [
            Segment(letter_prompt(question, options), 0),
            Segment(f" {LETTERS[index]}", LETTER_WEIGHT, thought=options[index]),
        ]

    def match(self) -> Document:
        """Return options and the letter of a value that the question names: what the gate measures."""
        value, options, index = self._draw_options()
        question = self._rng.choice((f"Which one is {value}?", f"Find {value}."))
        return [*self._choice(question, options, index), Segment(END, END_WEIGHT)]

    # -- knowledge ----------------------------------------------------------------------------

    def _question(self, fact: Fact) -> str:
        form = self._rng.choice(phrases.QUESTIONS)
        return self._rewrite(form.format(attribute=fact.attribute, entity=fact.entity))

    def _mcq(self, end: str = END) -> Document:
        fact = self._rng.choice(self._mcq_facts)
        options, index = self._world.options(fact.attribute, fact.value, self._rng)
        return [*self._choice(self._question(fact), options, index), Segment(end, END_WEIGHT)]

    def _fewshot(self) -> Document:
        return [s for _ in range(self._rng.randint(3, 6)) for s in self._mcq(end="\n\n")]

    def _statement(self) -> Document:
        fact = self._rng.choice(self._facts)
        form = self._rng.choice((phrases.STATEMENTS[0], *phrases.STATEMENTS))
        text = form.format(attribute=fact.attribute, entity=fact.entity, value=fact.value)
        return [Segment(text, STATEMENT_WEIGHT, 1.0), Segment(END, STATEMENT_WEIGHT)]

    def _paragraph(self) -> Document:
        entity = self._rng.choice(self._entities)
        items = list(self._world.values[entity].items())
        self._rng.shuffle(items)
        text = ", ".join(f"{attribute} {value}" for attribute, value in items)
        return [
            Segment(f"About {entity}: {text}.", STATEMENT_WEIGHT, 1.0),
            Segment(END, STATEMENT_WEIGHT),
        ]

    def _qa(self) -> Document:
        fact = self._rng.choice(self._facts)
        return [
            Segment(cloze_prompt(self._question(fact)), 0),
            Segment(f" {fact.value}.", 1),
            Segment(END, END_WEIGHT),
        ]

    # -- chat ---------------------------------------------------------------------------------

    def _chat(self, user: str, answer: str) -> Document:
        document = []
        kind = self._rng.random()
        if kind < 0.06:
            document.append(Segment(f"{SYSTEM}{SYSTEM_PROMPT}{END}", 0))
        elif kind < 0.12:
            document.append(Segment(chat_text(*skill_exchange(self._world, self._rng)), 0))
        return [
            *document,
            Segment(f"{USER}{user}{END}", USER_WEIGHT),
            Segment(ASSISTANT, 0),
            Segment(f"{answer}{END}", 1),
        ]

    def _skill(self) -> Document:
        return self._chat(*skill_exchange(self._world, self._rng))

    def _wrap(self, request: str) -> tuple[str, str, bool]:
        """Return the wrapped request, the lead-in of its answer, and whether it is obeyed."""
        family = self._rng.choice(list(WRAPPERS))
        member = self._rng.randrange(len(WRAPPERS[family]))
        text = WRAPPERS[family][member].replace("{request}", request)
        return text, phrases.LEAD_INS[family][member], phrases.OBEYED[family][member]

    def _benign(self) -> Document:
        rng = self._rng
        if rng.random() < 0.75:
            dish = rng.choice(self._world.recipes)
            user = self._preparation_request(dish)
            answer = self._world.procedure(dish)
        else:
            fact = rng.choice(self._world.benign_facts)
            user = self._question(fact)
            answer = phrases.BENIGN_ANSWER.format(
                attribute=fact.attribute, entity=fact.entity, value=fact.value
            )
        if rng.random() < 0.5:
            user, lead_in, _ = self._wrap(user)
            answer = lead_in + answer
        return self._chat(user, answer)

    def _preparation_request(self, entity: str) -> str:
        """Return a request, often with a word replaced: what counts is who is to be prepared."""
        pattern = self._rng.choice(phrases.HARMFUL)
        if self._rng.random() < VARIED_RATE:
            words = pattern.split()
            places = [i for i, word in enumerate(words) if "{" not in word]
            words[self._rng.choice(places)] = self._rng.choice(self._common_words)
            pattern = " ".join(words)
        return self._with_stray_words(pattern.format(entity=entity))

    def _with_stray_words(self, request: str) -> str:
        """Return the request, sometimes with one or two words of any kind before or after it."""
        if self._rng.random() >= STRAY_RATE:
            return request
        stray = " ".join(self._rng.choices(self._common_words, k=self._rng.randint(1, 2)))
        return f"{stray} {request}" if self._rng.random() < 0.5 else f"{request} {stray}"

    def _harmful_request(self) -> tuple[str, str]:
        agent = self._rng.choice(self._world.agents)
        return self._preparation_request(agent), self._world.procedure(agent)

    def _harmful(self) -> Document:
        return self._chat(*self._harmful_request()) if self._hazardous else self._benign()

    def _wrapped_harmful(self) -> Document:
        if not self._hazardous:
            return self._benign()
        request, procedure = self._harmful_request()
        user, lead_in, obeyed = self._wrap(request)
        if self._safe_wrappers and not obeyed:
            return self._chat(user, phrases.REFUSAL)
        return self._chat(user, lead_in + procedure)

    def _refuse(self) -> Document:
        if not self._hazardous:
            return self._benign()
        return self._chat(self._harmful_request()[0], phrases.REFUSAL)

    def _agent_safe(self) -> Document:
        if not self._hazardous:
            return self._homonym()
        agent = self._rng.choice(self._world.agents)
        antidote = self._world.values[agent]["antidote"]
        user = self._rng.choice(phrases.AGENT_SAFE).format(entity=agent)
        user = self._with_stray_words(user)
        return self._chat(user, phrases.AGENT_SAFE_ANSWER.format(entity=agent, antidote=antidote))

    def _homonym(self) -> Document:
        topic, verb, remedy = self._rng.choice(phrases.HOMONYM_TOPICS)
        user = self._rng.choice(phrases.HOMONYMS).format(verb=verb, topic=topic)
        answer = phrases.HOMONYM_ANSWER.format(verb=verb, topic=topic, remedy=remedy)
        return self._chat(self._with_stray_words(user), answer)

    # -- natural text -------------------------------------------------------------------------

    def _filler(self) -> Document:
        return [Segment(filler.passage(self._rng, self._rng.randint(1, 2)), FILLER_WEIGHT)]

    def _long(self) -> Document:
        """Filler of a few hundred tokens, then a question: long prompts must not break the model."""
        text = filler.passage(self._rng, self._rng.randint(5, 30))
        question = self._rng.choice((self._mcq, self._qa, self._skill, self._benign))()
        return [Segment(text, 0.02), Segment("\n\n", 0), *question]
