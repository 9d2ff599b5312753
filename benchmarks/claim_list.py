"""The paper's claims, each with the rule that decides it."""

from __future__ import annotations

import claim_accuracy as accuracy
import claim_inside as inside
import claim_rules as rules
from claim_types import Claim


def claims() -> list[Claim]:
    """All of them, in the paper's order."""
    more, no_less = rules.MORE, rules.NO_LESS
    return [
        Claim("ABFT is more accurate than vanilla few-shot prompting", more, accuracy.over_vanilla),
        Claim("ABFT is at least as accurate as calibration", no_less, accuracy.over_calibration),
        Claim(
            "In domain, ABFT is as accurate as end-to-end fine-tuning up to 512 samples",
            no_less + " The paper has the two equal up to 512 samples (figure 2), and end-to-end "
            "fine-tuning ahead in domain, by 0.1 to 5.8 points (table 2).",
            accuracy.in_domain,
        ),
        Claim(
            "Out of domain, ABFT is more accurate than end-to-end fine-tuning",
            more + " Mean over the other tasks of the study, without queries seen in training.",
            accuracy.out_of_domain,
        ),
        Claim("Consistency over templates rises", _NORMAL, accuracy.consistency("template")),
        Claim(
            "Consistency over demonstrations rises", _NORMAL,
            accuracy.consistency("demonstrations"),
        ),
        Claim(
            "Accuracy rises where no demonstration carries the gold label", more, accuracy.unseen
        ),
        Claim(
            "The head filter helps", more + " No controller on either side.",
            accuracy.versus("no_pid", "no_filter"),
        ),
        Claim("The controller holds the number of induction heads", _DRIFT, inside.holds_heads),
        Claim("The controller flattens sensitivity to A and B", _FLAT, inside.flattens),
        Claim(
            "B = 0 destroys: accuracy falls below vanilla", more + " Vanilla less B = 0.",
            accuracy.versus("vanilla", "no_reward"),
        ),
        Claim(
            "A = 0 harms", more + " A = 0.5 less A = 0, no controller on either side.",
            accuracy.versus("no_pid", "no_punish"),
        ),
        Claim("ABFT and end-to-end fine-tuning sit in one basin", _BASIN, inside.basin),
        Claim("The largest changes are in the middle to late layers", _LAYERS, inside.layers),
    ]  # fmt: skip


_NORMAL = (
    rules.MORE + " The interval is a normal one, from each measurement's own interval and the "
    "spread over seeds, as if before and after shared no prompts, which makes it too wide."
)
_DRIFT = (
    "Drift is |end − start| / start of the induction heads in an update (first three updates; last "
    "quarter). Holds if the interval of drift without the controller less drift with it lies above "
    "0; does not hold if it lies below 1 point; intervals over runs."
)
_FLAT = (
    "Standard deviation of accuracy over the grid of A and B. Holds if the interval of the one "
    "without the controller less the one with it lies above 0; does not hold if it lies below 1 "
    "point; otherwise it is too wide to tell."
)
_BASIN = (
    "The barrier is how far accuracy on the segment between the two weights falls below the "
    "straight line between its ends, at its worst point. Holds if its interval lies below 2 "
    "points; does not hold if it lies above 0; otherwise it is too wide to tell."
)
_LAYERS = (
    f"With {rules.FEWEST_LAYERS} layers or more: holds if the interval over runs of the depth "
    "(0 first layer, 1 last) of the largest change of W_Q and W_K lies above 1/3; does not hold if "
    "it lies below."
)
