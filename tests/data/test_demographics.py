"""MIMIC's groups: against what the generator drew, mimic-code's list, and the rules by hand."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from data import mimic, synthetic
from data.demographics import ethnic_group
from data.groups import read_groups
from data.notes import age_band
from data.synthetic_patients import Patient
from tests.data.test_mimic import ADMISSION, SECRET, SUMMARY, write_table
from tests.data.test_outcomes import mimic4  # noqa: F401 (fixture)

pytest.importorskip("duckdb", reason="the optional library duckdb is absent")

NAMES = ("sex", "age", "ethnicity", "insurance")


@pytest.fixture(scope="module")
def drawn() -> list[Patient]:
    """The patients of `cohort`, as the generator knew them."""
    return []


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory, drawn: list[Patient]) -> Path:
    draw = synthetic.draw_patient

    def remembering(*arguments: Any) -> Patient:
        drawn.append(draw(*arguments))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "draw_patient", remembering)
        return synthetic.make_cohort(
            tmp_path_factory.mktemp("cohort") / "made", patients=500, seed=11
        )


def groups_of(folder: Path, task: str = "mor") -> dict[int, tuple[str | None, ...]]:
    source = mimic.open_mimic(folder, task, grouped=True)
    rows = [note.groups for note in source]
    return dict(zip(source.admission_ids().tolist(), rows, strict=True))


ETHNICITY = {
    "WHITE": "white", "BLACK/AFRICAN AMERICAN": "black", "ASIAN": "asian",
    "HISPANIC OR LATINO": "hispanic",
}  # fmt: skip


@pytest.mark.parametrize("task", ["mor", "pmv"])
def test_groups_are_what_the_generator_drew(cohort: Path, drawn: list[Patient], task: str) -> None:
    found = groups_of(cohort / "mimic-iii", task)
    known = {stay.hadm_id: (p, stay) for p in drawn for stay in p.admissions}
    assert set(found) <= set(known) and len(found) > (400 if task == "mor" else 50)
    shifted = 0
    for hadm_id, (sex, age, ethnicity, insurance) in found.items():
        patient, stay = known[hadm_id]
        assert (sex, ethnicity) == (patient.sex, ETHNICITY[patient.ethnicity])
        # A birth is drawn of the first age; later ones are whole years after rounded gaps.
        first = patient.admissions[0]
        born = first.admitted - timedelta(days=round(first.age * 365.25) + 20)
        years = (stay.admitted - born).days / 365.25
        assert age == age_band(years) or first.age >= 90
        assert first.age < 90 or age == "85 and over"
        shifted += first.age >= 90
        assert insurance == "Medicare" if stay.age >= 65 else insurance is not None
    assert task == "pmv" or shifted > 0


def test_the_cohorts_groups_vary_and_are_categories(cohort: Path) -> None:
    groups = read_groups(mimic.open_mimic(cohort / "mimic-iii", grouped=True))
    assert tuple(groups) == NAMES
    assert groups["sex"].values == ("F", "M")
    assert groups["ethnicity"].values == ("asian", "black", "hispanic", "white")
    assert groups["insurance"].values == ("Medicaid", "Medicare", "Private", "Self Pay")
    assert len(groups["age"].values) >= 5
    assert all((column.codes >= 0).all() for column in groups.values())


def test_mimic4_tells_the_same_groups(
    cohort: Path,
    mimic4: Path,  # noqa: F811
) -> None:
    ours, theirs = groups_of(cohort / "mimic-iii"), groups_of(mimic4)
    assert ours.keys() == theirs.keys()
    same = [[a == b for a, b in zip(ours[i], theirs[i], strict=True)] for i in ours]
    sex, age, ethnicity, insurance = (sum(column) for column in zip(*same, strict=True))
    assert sex == ethnicity == insurance == len(ours)
    # MIMIC-IV tells whole years: ages differ by up to one, bands at their edges.
    assert age > 0.95 * len(ours)


def test_groups_change_neither_notes_nor_fingerprint(cohort: Path) -> None:
    plain = mimic.open_mimic(cohort / "mimic-iii")
    grouped = mimic.open_mimic(cohort / "mimic-iii", grouped=True)
    assert plain.group_names == () and plain.fingerprint() == grouped.fingerprint()
    assert plain.description == grouped.description
    for one, other in zip(plain, grouped, strict=True):
        assert one.groups == () and one == other._replace(groups=())
    assert plain.counts == grouped.counts


@pytest.mark.parametrize(
    ("value", "group"),
    [
        ("WHITE", "white"), ("WHITE - OTHER EUROPEAN", "white"), ("BLACK/CAPE VERDEAN", "black"),
        ("CARIBBEAN ISLAND", "black"), ("HISPANIC/LATINO - CUBAN", "hispanic"),
        ("HISPANIC OR LATINO", "hispanic"), ("ASIAN - KOREAN", "asian"), ("asian", "asian"),
        ("AMERICAN INDIAN/ALASKA NATIVE FEDERALLY RECOGNIZED TRIBE", "native"),
        ("MIDDLE EASTERN", "other"), ("PORTUGUESE", "other"), ("SOUTH AMERICAN", "other"),
        ("MULTI RACE ETHNICITY", "other"), ("OTHER", "other"),
        ("NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER", "other"),
        ("UNKNOWN/NOT SPECIFIED", None), ("UNKNOWN", None), ("UNABLE TO OBTAIN", None),
        ("PATIENT DECLINED TO ANSWER", None), ("", None),
    ],
)  # fmt: skip
def test_ethnicities_are_grouped_as_mimic_code_does(value: str, group: str | None) -> None:
    assert ethnic_group(value) == group


def write(folder: Path, patients: list[dict[str, str]] | None, **admission: str) -> Path:
    write_table(folder / "ADMISSIONS.csv", "ADMISSIONS", [ADMISSION | admission])
    write_table(folder / "NOTEEVENTS.csv", "NOTEEVENTS", [SUMMARY])
    if patients is not None:
        rows = [{"SUBJECT_ID": "7", "GENDER": "F", "DOB": "2090-01-01"} | p for p in patients]
        write_table(folder / "PATIENTS.csv", "PATIENTS", rows)
    return folder


@pytest.mark.parametrize(
    ("born", "age"),
    [
        ("2132-01-02", "under 18"),
        ("2131-12-31", "18 to 44"),
        ("2105-01-02", "18 to 44"),
        ("2104-12-31", "45 to 64"),
        ("1850-01-01", "85 and over"),  # over 89, shifted
        ("2150-03-01", None),  # after the admission
        ("", None),
    ],
)
def test_an_age_is_that_at_admission(tmp_path: Path, born: str, age: str | None) -> None:
    found = groups_of(write(tmp_path, [{"DOB": born and f"{born} 00:00:00"}], ETHNICITY="ASIAN"))
    assert found == {100: ("F", age, "asian", None)}


def test_without_patients_or_their_row_less_is_told(tmp_path: Path) -> None:
    source = mimic.open_mimic(write(tmp_path, None, INSURANCE="Private"), grouped=True)
    assert source.group_names == ("ethnicity", "insurance")
    assert [note.groups for note in source] == [(None, "Private")]
    write(tmp_path, [{"SUBJECT_ID": "8"}], INSURANCE="Private")
    assert groups_of(tmp_path) == {100: (None, None, None, "Private")}


@pytest.mark.parametrize(
    ("patients", "said"),
    [
        ([{"DOB": SECRET}], "a date of birth is not a date like 2151-08-04"),
        ([{}, {}], "a patient stands in more than one row"),
    ],
)
def test_damaged_patients_tell_no_group_and_why(
    tmp_path: Path, patients: list[dict[str, str]], said: str
) -> None:
    """The task does not read them, so the notes and what ADMISSIONS tells stay."""
    write(tmp_path, patients, INSURANCE="Private", ETHNICITY="ASIAN")
    source = mimic.open_mimic(tmp_path, grouped=True)
    left_out: dict[str, str] = {}
    groups = read_groups(source, left_out)
    assert {name: column.values for name, column in groups.items()} == {
        "sex": (), "age": (), "ethnicity": ("asian",), "insurance": ("Private",)
    }  # fmt: skip
    assert left_out == {} and list(source.groups_left_out) == ["sex", "age"]
    assert all(said in reason for reason in source.groups_left_out.values())
    assert SECRET not in str(source.groups_left_out)


def test_a_copy_of_real_columns_is_read(real_data: Path) -> None:
    from data.demographics import MIMIC4, Demographics
    from data.tables import connect, find_table

    folder = real_data / "mimic-iv-synthetic"
    found = Demographics(MIMIC4, find_table(folder, "admissions"), find_table(folder, "patients"))
    assert found.names == NAMES
    with connect() as connection:
        groups = found.read(connection)
    ages = [age for _, age, _, _ in groups.values()]
    assert 0 < ages.count(None) < len(ages)  # some years of birth are missing there
