"""The options of training itself: a config's section `train`."""

import dataclasses
from collections.abc import Sequence

from fcvit_jax.errors import UserError, check_range


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How long a run trains, and what it does on the way: `config.train`.

    Attributes:
      epochs: of the learning rate's schedule.
      steps: stop after this many updates; None: after all epochs.
      accumulate: number of parts that a batch is computed in, to save memory.
      ema_decay: of the averaged weights, such as 0.9998; None: off.
      ema_warmup: begin with a smaller decay, as `optim.update_ema` says.
      log_every: steps between two lines of metrics.jsonl.
      eval_every: epochs between two evaluations.
      profile_steps: (first, last): the updates from first to last are traced by JAX's profiler; (): none.

    Raises:
      UserError: a value is out of its range.
    """

    epochs: int
    steps: int | None
    accumulate: int
    ema_decay: float | None
    log_every: int
    eval_every: int
    profile_steps: Sequence[int] = ()
    ema_warmup: bool = False

    def __post_init__(self):
        numbers = {"steps": self.steps} if self.steps is not None else {}
        counts = {key: getattr(self, key) for key in ("epochs", "accumulate", "log_every", "eval_every")}
        check_range("train", 1, below=2**31, **counts, **numbers)
        check_range("train", 1, below=10**6, epochs=self.epochs)
        if self.ema_decay is not None:
            check_range("train", 0, below=1, ema_decay=self.ema_decay)
        elif self.ema_warmup:
            raise UserError("train.ema_warmup=True needs a train.ema_decay, such as 0.9998.")
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise UserError(
                f"train.profile_steps={steps} must be the first and the last step to trace, from 1 up, or ()."
            )
