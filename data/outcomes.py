"""What became of an admission: the labels of the five tasks, from the tables alone.

    pmv   ventilated for seven days or more, of those ventilated for two (XLN's cohort, which BEEP
          and Clinical LLaMA-LoRA narrow to admission notes)
    mor   death in hospital
    los   days of stay in four classes: up to 3, 7, 14, and more; without those who died
    diag  the groups of all diagnosis codes; several labels an admission
    proc  the groups of all procedure codes

`mor`, `los`, `diag` and `proc` are those of CORe (van Aken et al., EACL 2021). An admission without
a label of a task has a reason instead, which is counted. With `paper` the published quirks are
rebuilt: see docs/cohorts.md.

Invariant: a code is text. Read as a number it has lost its zeros, and is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from data.tables import NOT_A_TIME, Table, not_a_time, not_whole
from data.ventilation import load_spans

TASKS = ("pmv", "mor", "los", "diag", "proc")
MULTILABEL_TASKS = ("diag", "proc")
# What people read instead of a task's name, and instead of its labels where these are numbers.
TITLES = {
    "pmv": "prolonged mechanical ventilation",
    "mor": "in-hospital mortality",
    "los": "length of stay",
    "diag": "diagnosis groups",
    "proc": "procedure groups",
}
LABEL_TITLES = {
    "pmv": {"0": "ventilated for under 7 days", "1": "ventilated for 7 days or more"},
    "mor": {"0": "survived", "1": "died in hospital"},
    "los": {
        "0": "up to 3 days", "1": "over 3 to 7 days", "2": "over 7 to 14 days", "3": "over 14 days"
    },
}  # fmt: skip
# The tasks whose notes must not tell of the patient's death.
UNTOLD_TASKS = ("pmv", "mor")

REASONS = {
    "pmv": (
        UNDER_18 := "under 18 years old",
        WITHOUT_STAY := "without an ICU stay",
        EXCLUDED_DIAGNOSIS := "diagnosis that pmv leaves out",
        NOT_VENTILATED := "not ventilated",
        SHORTLY_VENTILATED := "ventilated for less than 2 days",
    ),
    "mor": (),
    "los": (
        DIED := "died in hospital",
        BACKWARDS := "discharged before admitted",
    ),
    "diag": (NO_DIAGNOSIS := "without a diagnosis code",),
    "proc": (NO_PROCEDURE := "without a procedure code",),
}
BASE_DAYS, PROLONGED_DAYS, ALLOWANCE_DAYS = 2, 7, 0.25
# Patterns by version of the codes: cancers of mouth and throat, myopathies, burns of the face
# and head, burns of 30% of the body and more. Organ donors are known by the title of a code.
EXCLUDED_CODES = {
    "9": r"14.*|3589|3590|3591|35801|941.*|948[3-9].*",
    "10": r"C0.*|C1[0-4].*|G709|G710.*|G7001|T20.*|T31[3-9].*",
}
MANY_CODES = 500  # among so many numeric codes of ICD-9 some begin with a zero


class Layout(NamedTuple):
    """A release of MIMIC: where its tables have what a cohort is made of."""

    name: str
    # What a table is for -> its name, and the SQL that names its columns as they are named here.
    tables: dict[str, tuple[str, str]]
    label: str  # SQL of a label's name, of the code's `version` and `code_group`


MIMIC3 = Layout(
    "MIMIC-III",
    {
        "admissions": ("ADMISSIONS", "*"),
        "notes": (
            "NOTEEVENTS",
            "HADM_ID AS hadm_id, CHARTDATE AS day, DESCRIPTION = 'Report' AS report, TEXT AS text,"
            " CATEGORY = 'Discharge summary' AS of_discharge",
        ),
        "patients": ("PATIENTS", "SUBJECT_ID AS subject_id, DOB AS born"),
        "stays": ("ICUSTAYS", "HADM_ID AS hadm_id, ICUSTAY_ID AS stay_id"),
        "diagnoses": ("DIAGNOSES_ICD", "HADM_ID AS hadm_id, ICD9_CODE AS code, '9' AS version"),
        "procedures": ("PROCEDURES_ICD", "HADM_ID AS hadm_id, ICD9_CODE AS code, '9' AS version"),
        "titles": ("D_ICD_DIAGNOSES", "ICD9_CODE AS code, '9' AS version, LONG_TITLE AS title"),
        "charts": (
            "CHARTEVENTS",
            "ICUSTAY_ID AS stay_id, ITEMID AS item, CHARTTIME AS charted, VALUE AS value,"
            " coalesce(ERROR, '') = '1' AS wrong",
        ),
        "procedure_events": (
            "PROCEDUREEVENTS_MV",
            "ICUSTAY_ID AS stay_id, ITEMID AS item, STARTTIME AS charted",
        ),
    },
    "code_group",
)
MIMIC4 = Layout(
    "MIMIC-IV",
    {
        "admissions": ("admissions", "*"),
        "notes": (
            "discharge",
            "hadm_id, charttime AS day, note_type = 'DS' AS report, text, true AS of_discharge",
        ),
        # Ages are whole years: as if everybody were born a month before a year began.
        "patients": (
            "patients",
            "subject_id, make_date(TRY_CAST(anchor_year AS INTEGER)"
            " - TRY_CAST(anchor_age AS INTEGER) - 1, 12, 1)::VARCHAR AS born",
        ),
        "stays": ("icustays", "hadm_id, stay_id"),
        "diagnoses": ("diagnoses_icd", "hadm_id, icd_code AS code, icd_version AS version"),
        "procedures": ("procedures_icd", "hadm_id, icd_code AS code, icd_version AS version"),
        "titles": (
            "d_icd_diagnoses",
            "icd_code AS code, icd_version AS version, long_title AS title",
        ),
        "charts": (
            "chartevents",
            "stay_id, itemid AS item, charttime AS charted, value, false AS wrong",
        ),
        "procedure_events": (
            "procedureevents",
            "stay_id, itemid AS item, starttime AS charted",
        ),
    },
    "version || ':' || code_group",
)
NEEDS = {
    "pmv": (
        "admissions", "notes", "patients", "stays", "diagnoses", "titles", "charts",
        "procedure_events",
    ),
    "mor": ("admissions", "notes"),
    "los": ("admissions", "notes"),
    "diag": ("admissions", "notes", "diagnoses"),
    "proc": ("admissions", "notes", "procedures"),
}  # fmt: skip


class Outcomes:
    """The outcomes of one task in the tables of one release, made in a duckdb connection."""

    def __init__(self, layout: Layout, tables: dict[str, Table], task: str, *, paper: bool) -> None:
        self.layout, self.tables, self.task, self.paper = layout, tables, task, paper

    def rows(self, name: str, piece: Table | None = None) -> str:
        """A table, or a piece of one, under the names that are used here, as SQL."""
        table = piece or self.tables[name]
        return f"(SELECT {self.layout.tables[name][1]} FROM {table.csv()})"

    def load(self, connection: Any) -> tuple[str, ...]:
        """Makes the tables admissions and outcomes; returns labels that no admission need have.

        admissions: hadm_id, subject_id, newborn. outcomes: hadm_id, labels (a list) or NULL and
        the reason. Raises ValueError for a damaged table.
        """
        self._load_admissions(connection)
        if self.task in MULTILABEL_TASKS:
            return self._load_groups(connection)
        load = {"pmv": self._load_pmv, "mor": self._load_mor, "los": self._load_los}[self.task]
        load(connection)
        return ()

    def _load_admissions(self, connection: Any) -> None:
        table = self.tables["admissions"]
        with table.reading(connection):
            connection.execute(
                f"""
                CREATE TABLE raw_admissions AS
                SELECT hadm_id, subject_id, admission_type, hospital_expire_flag, admittime,
                    dischtime FROM {self.rows("admissions")}
                """
            )
        for column in ("HADM_ID", "SUBJECT_ID"):
            problem = f"{column} is not a whole number"
            table.refuse(connection, "raw_admissions", not_whole(column), problem)
        if self.task in ("mor", "los"):
            no_flag = "coalesce(hospital_expire_flag, '') NOT IN ('0', '1')"
            problem = "HOSPITAL_EXPIRE_FLAG is neither 0 nor 1"
            table.refuse(connection, "raw_admissions", no_flag, problem)
        if self.task in ("pmv", "los"):
            for column in ("ADMITTIME", "DISCHTIME"):
                problem = f"{column} {NOT_A_TIME}"
                table.refuse(connection, "raw_admissions", not_a_time(column), problem)
        connection.execute(
            """
            CREATE TABLE admissions AS
            SELECT hadm_id::BIGINT AS hadm_id, subject_id::BIGINT AS subject_id,
                coalesce(admission_type, '') = 'NEWBORN' AS newborn,
                hospital_expire_flag = '1' AS died, TRY_CAST(admittime AS TIMESTAMP) AS admitted,
                TRY_CAST(dischtime AS TIMESTAMP) AS discharged
            FROM raw_admissions
            """
        )
        copies = "(SELECT count(*) AS copies FROM admissions GROUP BY hadm_id)"
        table.refuse(connection, copies, "copies > 1", "HADM_ID stands in more than one row")

    def _load_mor(self, connection: Any) -> None:
        connection.execute(
            """
            CREATE TABLE outcomes AS
            SELECT hadm_id, [died::INTEGER::VARCHAR] AS labels, NULL::VARCHAR AS reason
            FROM admissions
            """
        )

    def _load_los(self, connection: Any) -> None:
        # As numpy rounds, and so the published labels: ten times the days, halves to the even.
        connection.execute(
            f"""
            CREATE TABLE outcomes AS
            SELECT hadm_id, [CASE WHEN days <= 3 THEN '0' WHEN days <= 7 THEN '1'
                WHEN days <= 14 THEN '2' ELSE '3' END] AS labels,
                CASE WHEN died THEN '{DIED}'
                    WHEN days < 0 AND NOT {self.paper} THEN '{BACKWARDS}' END AS reason
            FROM (
                SELECT hadm_id, died,
                    round_even(epoch(discharged - admitted) / 86400 * 10, 0) / 10 AS days
                FROM admissions
            )
            """
        )

    def _load_codes(self, connection: Any, name: str) -> None:
        """Makes the table codes: hadm_id, version, code."""
        table = self.tables[name]
        with table.reading(connection):
            connection.execute(
                f"""
                CREATE TABLE raw_codes AS
                SELECT hadm_id, version, trim(code) AS code FROM {self.rows(name)}
                WHERE trim(code) <> ''
                """
            )
        table.refuse(
            connection, "raw_codes", not_whole("hadm_id"), "an admission is not a whole number"
        )
        table.refuse(
            connection, "raw_codes", "version NOT IN ('9', '10')", "a code's version is not 9 or 10"
        )
        connection.execute(
            "CREATE TABLE codes AS SELECT hadm_id::BIGINT AS hadm_id, version, code FROM raw_codes"
        )
        numbers = r"FROM codes WHERE version = '9' AND regexp_full_match(code, '\d+')"
        lost = r"(version = '9' AND regexp_full_match(code, '\d{1,2}')) OR contains(code, '.')"
        many, with_zero, short = connection.execute(
            f"""
            SELECT (SELECT count(*) {numbers}), (SELECT count(*) {numbers} AND code LIKE '0%'),
                (SELECT count(*) FROM codes WHERE {lost})
            """
        ).fetchone()
        if short or (many >= MANY_CODES and not with_zero):
            found = (
                f"{short} codes have a decimal point or fewer than three digits"
                if short
                else f"none of {many} codes begins with a zero"
            )
            raise ValueError(
                f"{table.path}: the codes were read as numbers and have lost their leading zeros "
                f"({found}); export the table again with the code as text (pandas: dtype=str)"
            )

    def _load_groups(self, connection: Any) -> tuple[str, ...]:
        name, reason = {
            "diag": ("diagnoses", NO_DIAGNOSIS),
            "proc": ("procedures", NO_PROCEDURE),
        }[self.task]
        self._load_codes(connection, name)
        text = "code"
        if self.task == "proc" and self.paper:  # the published labels went through an integer
            text = "CASE WHEN version = '9' THEN TRY_CAST(code AS BIGINT)::VARCHAR ELSE code END"
        wide = "version = '9' AND left(code, 1) IN ('V', 'E')" if self.task == "diag" else "false"
        connection.execute(
            f"""
            CREATE TABLE groups AS
            SELECT DISTINCT hadm_id, {self.layout.label} AS label
            FROM (
                SELECT hadm_id, version, left({text}, CASE WHEN {wide} THEN 4 ELSE 3 END)
                    AS code_group FROM codes
            )
            """
        )
        connection.execute(
            f"""
            CREATE TABLE outcomes AS
            SELECT hadm_id, labels, CASE WHEN labels IS NULL THEN '{reason}' END AS reason
            FROM admissions LEFT JOIN (
                SELECT hadm_id, list(label ORDER BY label) AS labels FROM groups GROUP BY hadm_id
            ) USING (hadm_id)
            """
        )
        if not self.paper:
            return ()
        rows = connection.execute("SELECT DISTINCT label FROM groups ORDER BY label").fetchall()
        return tuple(label for (label,) in rows)

    def _load_pmv(self, connection: Any) -> None:
        self._load_codes(connection, "diagnoses")
        for name in ("titles", "patients", "stays"):
            with self.tables[name].reading(connection):
                connection.execute(f"CREATE TABLE {name} AS SELECT * FROM {self.rows(name)}")
        self._check_people(connection)
        load_spans(
            connection,
            self.tables["charts"],
            self.layout.tables["charts"][1],
            self.tables["procedure_events"],
            self.layout.tables["procedure_events"][1],
        )
        excluded = " OR ".join(
            f"(codes.version = '{version}' AND regexp_full_match(codes.code, '{pattern}'))"
            for version, pattern in EXCLUDED_CODES.items()
        )
        days = f"epoch(last_end - first_start) / 86400 + {ALLOWANCE_DAYS}"
        connection.execute(
            f"""
            CREATE TABLE outcomes AS
            WITH left_out AS (
                SELECT DISTINCT hadm_id
                FROM codes LEFT JOIN titles ON trim(titles.code) = codes.code
                    AND titles.version = codes.version
                WHERE {excluded} OR contains(lower(title), 'donor')
            ), stayed AS (
                SELECT hadm_id::BIGINT AS hadm_id, count(last_end) AS ventilated,
                    -- The first of the stays with enough ventilation says how long it was.
                    arg_min({days}, first_start) FILTER ({days} >= {BASE_DAYS}) AS days
                FROM stays LEFT JOIN spans ON spans.stay_id = stays.stay_id::BIGINT
                GROUP BY 1
            )
            SELECT hadm_id, [(days >= {PROLONGED_DAYS})::INTEGER::VARCHAR] AS labels, CASE
                WHEN date_diff('day', born::TIMESTAMP, admitted) / 365.242 < 18 THEN '{UNDER_18}'
                WHEN stayed.hadm_id IS NULL THEN '{WITHOUT_STAY}'
                WHEN left_out.hadm_id IS NOT NULL THEN '{EXCLUDED_DIAGNOSIS}'
                WHEN ventilated = 0 THEN '{NOT_VENTILATED}'
                WHEN days IS NULL THEN '{SHORTLY_VENTILATED}' END AS reason
            FROM admissions JOIN people USING (subject_id)
                LEFT JOIN stayed USING (hadm_id) LEFT JOIN left_out USING (hadm_id)
            """
        )

    def _check_people(self, connection: Any) -> None:
        """Refuses ids, births and stays that cannot be; makes the table people."""
        patients, stays = self.tables["patients"], self.tables["stays"]
        patients.refuse(
            connection, "patients", not_whole("subject_id"), "a patient is not a whole number"
        )
        patients.refuse(connection, "patients", not_a_time("born"), f"a date of birth {NOT_A_TIME}")
        for column in ("hadm_id", "stay_id"):
            problem = f"{column} is not a whole number"
            stays.refuse(connection, "stays", not_whole(column), problem)
        connection.execute(
            "CREATE TABLE people AS SELECT subject_id::BIGINT AS subject_id, born FROM patients"
        )
        copies = "(SELECT count(*) AS copies FROM people GROUP BY subject_id)"
        patients.refuse(connection, copies, "copies > 1", "a patient stands in more than one row")
        unknown = "(SELECT 1 FROM admissions ANTI JOIN people USING (subject_id))"
        patients.refuse(connection, unknown, "true", "an admission's patient is missing")
