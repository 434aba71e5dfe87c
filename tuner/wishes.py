"""What people ask of the daemon, and how it is granted: pause, resume, roll back, approve, reject.

A wish waits in a queue until a tick takes it, so that the tick stays the only writer. Wish and answer
become an OperatorAction row and a line of the story. A wish may name the champion that the person saw:
where another serves by then, somebody else was faster, and the wish is refused.
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
    role: str = "operator"
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
            arguments = dict(wish.arguments)
            session.add(OperatorAction(wish.action, arguments, wish.actor, now, state, answer, wish.role))
            tell(session, now, "person", f"{wish.actor}: {wish.action}. {answer}")
        wish.answer.set_result(answer)

    def _granted(self, wish: Wish, now: float) -> str:
        self._check_champion(wish)
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

    def _check_champion(self, wish: Wish) -> None:
        """Raises ValueError where the person decided while looking at a champion that no longer serves."""
        expected = wish.arguments.get("expected_champion")
        if expected is None:
            return
        champion = self.promotion.champion()
        serving = "none" if champion is None else champion.config_id
        if serving != expected:
            raise ValueError(
                f"champion {expected} was expected, but {serving} serves by now. Look again, then decide."
            )
