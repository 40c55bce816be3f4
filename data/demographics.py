"""Who MIMIC's patients are, in the few groups by which results are told apart.

Sex, band of age at admission, ethnicity and insurance, from PATIENTS and ADMISSIONS. Ages come in
the bands of data.notes.age_band, the last of which takes those over 89, which MIMIC-III shifts to
300 and MIMIC-IV writes as 91. Ethnicity is grouped as in mimic-code's icustay_detail: MIMIC's own
41 values are mostly too rare to be scored one by one.

Invariant: what is not known is None, and such a note is in no group rather than in one of the
unknown.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from data.notes import age_band
from data.tables import NOT_A_TIME, Table, not_a_time, not_whole

# What a value begins with -> its group. Whatever else is told is "other".
ETHNICITIES = {
    "WHITE": "white",
    "BLACK": "black",
    "CARIBBEAN": "black",
    "HISPANIC": "hispanic",
    "ASIAN": "asian",
    "AMERICAN INDIAN": "native",
}
UNTOLD = ("UNKNOWN", "UNABLE TO OBTAIN", "PATIENT DECLINED")


class Columns(NamedTuple):
    """Where a release says who its patients are."""

    sex: str
    age: str  # SQL of the years at admission, of `admitted` and the columns of patients
    damage: dict[str, tuple[str, str]]  # column -> SQL that holds of no cell but an empty one, why
    ethnicity: tuple[str, ...]  # the first that is there; releases differ
    insurance: str


MIMIC3 = Columns(
    sex="GENDER",
    age="date_diff('day', TRY_CAST(DOB AS TIMESTAMP), admitted) / 365.242",
    damage={"DOB": (not_a_time("DOB"), f"a date of birth {NOT_A_TIME}")},
    ethnicity=("ETHNICITY",),
    insurance="INSURANCE",
)
MIMIC4 = Columns(
    sex="gender",
    age="TRY_CAST(anchor_age AS INTEGER) + year(admitted) - TRY_CAST(anchor_year AS INTEGER)",
    damage={
        column: (not_whole(column), f"{column} is not a whole number")
        for column in ("anchor_age", "anchor_year")
    },
    ethnicity=("race", "ethnicity"),
    insurance="insurance",
)


class Demographics:
    """The groups of every admission, as far as the tables tell them.

    patients: None where there is no such table; sex and age are then not told.
    """

    def __init__(self, columns: Columns, admissions: Table, patients: Table | None) -> None:
        self._admissions, self._patients = admissions, patients
        self._damage = columns.damage
        self._sql: dict[str, str] = {}
        if patients is not None:
            self._sql |= _present("sex", (columns.sex,), patients) | {"age": columns.age}
        self._of_patients = tuple(self._sql)
        self._sql |= _present("ethnicity", columns.ethnicity, admissions)
        self._sql |= _present("insurance", (columns.insurance,), admissions)
        self.names = tuple(self._sql)
        self.left_out: dict[str, str] = {}  # name -> why it is told of nobody; known once read

    def read(self, connection: Any) -> dict[int, tuple[str | None, ...]]:
        """{HADM_ID: a value for each of `names`}; raises ValueError for damaged admissions.

        Of damaged patients nothing is told: no label and no note comes from what is read here.
        """
        admissions, joined = self._admissions, "admitted"
        with admissions.reading(connection):
            connection.execute(
                f"""
                CREATE TEMP TABLE admitted AS
                SELECT *, TRY_CAST(admittime AS TIMESTAMP) AS admitted FROM {admissions.csv()}
                """
            )
        admissions.refuse(
            connection, "admitted", not_whole("hadm_id"), "HADM_ID is not a whole number"
        )
        if self._patients is not None:
            try:
                self._load_patients(connection, self._patients)
                joined = "admitted LEFT JOIN persons ON persons.subject_id = admitted.subject_id"
            except ValueError as error:
                self.left_out |= dict.fromkeys(self._of_patients, str(error))
        told = ", ".join("NULL" if n in self.left_out else sql for n, sql in self._sql.items())
        rows = connection.execute(f"SELECT hadm_id::BIGINT, {told} FROM {joined}").fetchall()
        return {
            hadm_id: tuple(
                _group(name, value) for name, value in zip(self.names, values, strict=True)
            )
            for hadm_id, *values in rows
        }

    def _load_patients(self, connection: Any, patients: Table) -> None:
        patients.check_content()
        with patients.reading(connection):
            connection.execute(f"CREATE TEMP TABLE persons AS SELECT * FROM {patients.csv()}")
        for column, (condition, problem) in self._damage.items():
            told = f"(SELECT * FROM persons WHERE {column} <> '')"
            patients.refuse(connection, told, condition, problem)
        copies = "(SELECT count(*) AS copies FROM persons GROUP BY subject_id)"
        patients.refuse(connection, copies, "copies > 1", "a patient stands in more than one row")


def _present(name: str, choice: tuple[str, ...], table: Table) -> dict[str, str]:
    """The first column of the choice that the table has, under the name of a group."""
    known = {column.casefold() for column in table.columns}
    found = next((column for column in choice if column.casefold() in known), None)
    return {} if found is None else {name: found}


def _group(name: str, value: Any) -> str | None:
    """The group of a cell as it stands in the table, or of an age in years."""
    if name == "age":
        return age_band(value) if value is not None and value >= 0 else None
    text = (value or "").strip()
    return ethnic_group(text) if name == "ethnicity" else text or None


def ethnic_group(value: str) -> str | None:
    """white, black, hispanic, asian, native or other; None where the patient did not say."""
    value = value.strip().upper()
    if not value or value.startswith(UNTOLD):
        return None
    for begin, group in ETHNICITIES.items():
        if value.startswith(begin):
            return group
    return "other"
