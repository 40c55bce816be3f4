"""Who is in the made-up hospital: patients, their stays, and the law by which they die.

Latent conditions (data/conditions.py) drive both the words and the outcomes. Each admission has one
acute condition, a severity, complications and the patient's chronic conditions; death follows a
logistic model of these and of age. About a quarter of the adults die, more than in life, so that a
small test split still holds enough deaths.

Invariant. What is drawn here follows from the random stream it is given, which nothing else uses
first: the same stream gives the same patient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from data import conditions
from data.conditions import ACUTE, CHRONIC, COMPLICATIONS, SEVERITIES, Acute, Chronic, Complication
from data.mimic import DEATH_TOLD, KEPT, NO_REPORT, NO_SECTION, NO_SUMMARY, REPEATED

# The law of in-hospital death: logit P = BIAS + SCALE * (sum of the log-odds of the latents). Both
# are set so that about 22% of the adults die and the best expected AUROC is about 0.864.
BIAS = -2.65
SCALE = 0.74


@dataclass(frozen=True, kw_only=True)
class Admission:
    """One stay of an adult: its latents and what follows from them."""

    hadm_id: int
    age: int
    acute: Acute
    severity: int  # index into SEVERITIES
    complications: tuple[Complication, ...]
    chronic: tuple[Chronic, ...]
    risk: float  # true P(death in hospital)
    died: bool
    admitted: datetime
    discharged: datetime
    ventilated_hours: float  # 0: never
    fate: str  # one of fates("mor")

    @property
    def in_icu(self) -> bool:
        return self.severity > 0 or self.ventilated_hours > 0


@dataclass(frozen=True, kw_only=True)
class Patient:
    subject_id: int
    sex: str  # "M" or "F"
    ethnicity: str
    admissions: tuple[Admission, ...]


def death_risk(
    age: int,
    acute: Acute,
    severity: int,
    complications: Sequence[Complication],
    chronic: Sequence[Chronic],
) -> float:
    """P(death in hospital) = sigmoid(BIAS + SCALE * sum of log-odds), a number in (0, 1)."""
    log_odds = conditions.age_risk(age) + acute.risk + SEVERITIES[severity].risk
    log_odds += sum(item.risk for item in complications) + sum(item.risk for item in chronic)
    return 1.0 / (1.0 + math.exp(-(BIAS + SCALE * log_odds)))


def _pick(rng: random.Random, weights: Sequence[float]) -> int:
    """An index drawn with probability proportional to its weight."""
    point = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1


def draw_patient(rng: random.Random, subject_id: int, hadm_ids: Iterator[int]) -> Patient:
    """One adult with one to four admissions; the last one may end in death."""
    sex = rng.choice("MF")
    ethnicity = rng.choice(
        ("WHITE", "WHITE", "WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "HISPANIC OR LATINO")
    )
    first = ACUTE[_pick(rng, [acute.frequency for acute in ACUTE])]
    low, high = first.ages
    age = low + round((high - low) * max(rng.random(), rng.random()))  # older rather than younger
    exposure = min(max((age - 15) / 60, 0.05), 1.2)
    chronic = tuple(item for item in CHRONIC if rng.random() < item.frequency * exposure)
    start = datetime(2100, 1, 1) + timedelta(
        days=rng.randrange(33_000), minutes=rng.randrange(24 * 60)
    )

    admissions: list[Admission] = []
    acute = first
    while True:
        severity = _pick(rng, [level.frequency for level in SEVERITIES])
        complications = tuple(c for c in COMPLICATIONS if rng.random() < c.frequency[severity])
        risk = death_risk(age, acute, severity, complications, chronic)
        died = rng.random() < risk
        days = acute.stay * SEVERITIES[severity].stay * math.exp(rng.gauss(0.0, 0.45))
        days = max(days * (0.6 if died else 1.0), 0.3)
        ventilated = rng.random() < acute.ventilation * (0.0, 0.25, 1.0)[severity]
        hours = (
            round(min(0.75 * days * 24, days * 24 * rng.uniform(0.1, 0.7)), 1)
            if ventilated
            else 0.0
        )
        admissions.append(
            Admission(
                hadm_id=next(hadm_ids),
                age=age,
                acute=acute,
                severity=severity,
                complications=complications,
                chronic=chronic,
                risk=round(risk, 6),
                died=died,
                admitted=start,
                discharged=start + timedelta(minutes=round(days * 24 * 60)),
                ventilated_hours=hours,
                fate=_draw_fate(rng, died),
            )
        )
        if died or len(admissions) == 4 or rng.random() > 0.22:
            break
        gap = rng.randrange(20, 500)
        start = admissions[-1].discharged + timedelta(days=gap, minutes=rng.randrange(24 * 60))
        age += (gap + 180) // 365
        fitting = [item for item in ACUTE if item.ages[0] <= age <= item.ages[1]] or [first]
        acute = fitting[_pick(rng, [item.frequency for item in fitting])]

    # A summary can only be repeated later where there is a later one that is kept.
    for i in range(len(admissions) - 1):
        if admissions[i + 1].fate == KEPT and rng.random() < 0.04:
            admissions[i] = _with_fate(admissions[i], REPEATED)
    return Patient(
        subject_id=subject_id, sex=sex, ethnicity=ethnicity, admissions=tuple(admissions)
    )


def _draw_fate(rng: random.Random, died: bool) -> str:
    point = rng.random()
    if point < 0.02:
        return NO_SUMMARY
    if point < 0.03:
        return NO_REPORT
    if point < 0.04:
        return NO_SECTION
    if died and point < 0.06:
        return DEATH_TOLD
    return KEPT


def _with_fate(admission: Admission, fate: str) -> Admission:
    return Admission(**{**admission.__dict__, "fate": fate})


def expected_auroc(risk: np.ndarray) -> float:
    """The AUROC that the true risk itself expects over draws of the outcomes: no score can expect a
    better one.

    risk: float64 [n], each the P(positive) of one row. The value is the sum over pairs i != j of
    p_i (1 - p_j) ([p_i > p_j] + [p_i = p_j] / 2), divided by the sum over the same pairs of p_i (1
    - p_j).
    """
    values, group = np.unique(risk, return_inverse=True)
    positive = np.bincount(group, weights=risk, minlength=len(values))
    negative = np.bincount(group, weights=1.0 - risk, minlength=len(values))
    below = np.cumsum(negative) - negative
    with_self = float(np.sum(positive * (below + negative / 2)))
    itself = float(np.sum(risk * (1.0 - risk)))  # pairs i = j, counted above as ties
    return (with_self - itself / 2) / (float(risk.sum()) * float((1.0 - risk).sum()) - itself)
