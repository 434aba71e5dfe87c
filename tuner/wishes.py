"""What people ask of the daemon, and how it is granted: pause, resume, roll back, approve, reject.

A wish waits in a queue until a tick takes it, so that the tick stays the only writer. Wish and answer
become an OperatorAction row and a line of the story.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import RuntimeFault
from store.database import Store
from store.tables import OperatorAction
from tuner.promote import PromoteStage
from tuner.rows import tell


@dataclass
class Wish:
    """What a person asked through the API, and the promise of an answer."""

    action: str
    arguments: Mapping[str, Any]
    actor: str
    answer: Future[str] = field(default_factory=Future)


@dataclass
class WishDesk:
    """Grants wishes one at a time. `end_experiment` closes what is under way, with a reason."""

    store: Store
    promotion: PromoteStage
    end_experiment: Callable[[str, float], None]
    is_paused: bool = False

    def grant(self, wish: Wish, now: float) -> None:
        """Never raises for a bad wish: the person gets the reason as the answer."""
        try:
            answer, state = self._granted(wish, now), "DONE"
        except (RuntimeFault, KeyError, ValueError) as error:
            answer, state = f"Refused: {error}", "REFUSED"
        with self.store.journal() as session:
            session.add(OperatorAction(wish.action, dict(wish.arguments), wish.actor, now, state, answer))
            tell(session, now, "person", f"{wish.actor}: {wish.action}. {answer}")
        wish.answer.set_result(answer)

    def _granted(self, wish: Wish, now: float) -> str:
        if wish.action == "pause":
            self.is_paused = True
            self.end_experiment("interrupted: paused by a person", now)
            return "Tuning is paused; the champion serves."
        if wish.action == "resume":
            self.is_paused = False
            return "Tuning goes on."
        if wish.action == "rollback":
            target = str(wish.arguments.get("to", "previous"))
            if self.promotion.can_roll_back(target):
                self.end_experiment("interrupted: rolled back by a person", now)
            return self.promotion.rollback(target, f"Asked for by {wish.actor}.", now)
        if wish.action in ("approve", "reject"):
            number = int(wish.arguments["recommendation_id"])
            if wish.action == "approve" and self.promotion.is_open(number):
                self.end_experiment("interrupted: another configuration was approved", now)
            return self.promotion.decide(number, wish.action == "approve", wish.actor, now)
        raise ValueError(f"Unknown action {wish.action!r}; known: pause, resume, rollback, approve, reject.")
