"""When a patient was on the ventilator: charted settings turned into events, events into spans.

The rules are those of the MIMIC Code Repository's ventilation durations (Johnson et al., JAMIA
2018): a charted ventilator setting says "on the ventilator now"; settings at most eight hours apart
belong to one event; an extubation, or oxygen without a ventilator setting, ends it; an event of a
single moment is none. The span of an ICU stay runs from its first event's start to its last one's
end, gaps included.

Invariant: the charted rows are reduced to one row for each stay and minute while they are read, so
memory grows with the ventilated hours and not with CHARTEVENTS, which has tens of gigabytes.
"""

from __future__ import annotations

from typing import Any

from data.tables import NOT_A_TIME, Table, not_a_time, not_whole

GAP_HOURS = 8  # between two settings of one event, at most

# Items of CHARTEVENTS (CareVue below 220000, MetaVision from there on).
VENTILATOR_MODE, VENTILATOR_TYPE, VENTILATOR_TYPE_OLD = 223849, 223848, 720
OXYGEN_DEVICE, OXYGEN_DEVICE_OLD, EXTUBATED_OLD = 226732, 467, 640
SETTINGS = (
    *(445, 448, 449, 450, 1340, 1486, 1600, 224687),  # minute volume
    *(639, 654, 681, 682, 683, 684, 224684, 224685, 224686),  # tidal volume
    *(218, 436, 444, 535, 224695, 224696, 224697, 224746, 224747),  # airway pressures
    *(1, 221, 1211, 1655, 2000, 224419, 224738, 224750, 226873, 227187),  # inspiratory pressure
    *(543,),  # plateau pressure
    *(5865, 5866, 224705, 224706, 224707, 224709),  # airway pressure release
    *(60, 437, 505, 506, 686, 220339, 224700),  # positive end-expiratory pressure
    *(3459,),  # high pressure relief
    *(501, 502, 503, 224702),  # pressure control
    *(223, 667, 668, 669, 670, 671, 672),  # time-cycled pressure control
    *(224701,),  # pressure support
)
# Values of the two items that name an oxygen device; compared without surrounding blanks.
OXYGEN = (
    "Nasal cannula", "Face tent", "Aerosol-cool", "Trach mask", "High flow neb", "Non-rebreather",
    "Venti mask", "Medium conc mask", "T-piece", "High flow nasal cannula", "Ultrasonic neb",
    "Vapomist",
)  # fmt: skip
OXYGEN_OLD = (
    "Cannula", "Nasal Cannula", "Face Tent", "Aerosol-Cool", "Trach Mask", "Hi Flow Neb",
    "Non-Rebreather", "Venti Mask", "Medium Conc Mask", "Vapotherm", "T-Piece", "Hood", "Hut",
    "TranstrachealCat", "Heated Neb", "Ultrasonic Neb",
)  # fmt: skip
EXTUBATED_VALUES = ("Extubated", "Self Extubation")
# Items of PROCEDUREEVENTS_MV: planned, by the patient, neither planned nor by the patient.
EXTUBATIONS = (227194, 225468, 225477)


def load_spans(
    connection: Any, charts: Table, chart_columns: str, procedures: Table, procedure_columns: str
) -> None:
    """Makes the table spans: stay_id, first_start, last_end of every ventilated ICU stay.

    chart_columns: SQL that names stay_id, item, charted, value and wrong (an entry in error);
    procedure_columns: stay_id, item, charted. Raises ValueError for a damaged table.
    """
    with charts.reading(connection):
        connection.execute(
            f"""
            CREATE TABLE charted AS
            SELECT stay_id, charted, item IS NULL AS not_an_item,
                bool_or({_is_ventilator()}) AS ventilator,
                bool_or({_is_oxygen()}) AS oxygen,
                bool_or(item = {EXTUBATED_OLD} AND value IN {EXTUBATED_VALUES}) AS extubated
            FROM (
                SELECT stay_id, TRY_CAST(item AS BIGINT) AS item, charted, trim(value) AS value
                FROM (SELECT {chart_columns} FROM {charts.csv()})
                WHERE value <> '' AND NOT wrong
            )
            WHERE item IS NULL OR (stay_id <> '' AND item IN {_items()})
            GROUP BY ALL
            """
        )
    with procedures.reading(connection):
        connection.execute(
            f"""
            CREATE TABLE extubations AS
            SELECT DISTINCT stay_id, charted, item IS NULL AS not_an_item
            FROM (
                SELECT stay_id, TRY_CAST(item AS BIGINT) AS item, charted
                FROM (SELECT {procedure_columns} FROM {procedures.csv()})
            )
            WHERE item IS NULL OR (stay_id <> '' AND item IN {EXTUBATIONS})
            """
        )
    for table, rows in ((charts, "charted"), (procedures, "extubations")):
        table.refuse(connection, rows, "not_an_item", "an item is not a whole number")
        table.refuse(connection, rows, not_whole("stay_id"), "an ICU stay is not a whole number")
        table.refuse(connection, rows, not_a_time("charted"), f"a time {NOT_A_TIME}")
    connection.execute(
        f"""
        CREATE TABLE spans AS
        WITH moments AS (
            SELECT stay_id::BIGINT AS stay_id, charted::TIMESTAMP AS charted, ventilator, oxygen,
                extubated FROM charted
            UNION
            SELECT stay_id::BIGINT, charted::TIMESTAMP, false, false, true FROM extubations
        ), marked AS (
            SELECT *, ventilator OR extubated AS counts,
                CASE WHEN ventilator THEN lag(charted) OVER (
                    PARTITION BY stay_id, ventilator ORDER BY charted) END AS last_setting,
                lag(extubated, 1, false) OVER (
                    PARTITION BY stay_id, ventilator OR extubated ORDER BY charted, extubated
                ) AS after_extubation
            FROM moments
        ), numbered AS (
            -- Moments of the same time share a number.
            SELECT *, sum(CASE
                WHEN after_extubation OR (oxygen AND NOT ventilator)
                    OR charted > last_setting + INTERVAL {GAP_HOURS} HOUR THEN 1 ELSE 0 END
            ) OVER (PARTITION BY stay_id ORDER BY charted) AS event
            FROM marked
        ), events AS (
            SELECT stay_id, min(charted) AS start, max(charted) AS stop
            FROM numbered WHERE counts GROUP BY stay_id, event
            HAVING bool_or(ventilator) AND min(charted) < max(charted)
        )
        SELECT stay_id, min(start) AS first_start, max(stop) AS last_end
        FROM events GROUP BY stay_id
        """
    )


def _items() -> tuple[int, ...]:
    named = (VENTILATOR_MODE, VENTILATOR_TYPE, VENTILATOR_TYPE_OLD, OXYGEN_DEVICE)
    return (*SETTINGS, *named, OXYGEN_DEVICE_OLD, EXTUBATED_OLD)


def _is_ventilator() -> str:
    return (
        f"item IN {(*SETTINGS, VENTILATOR_MODE)}"
        f" OR (item = {VENTILATOR_TYPE_OLD} AND value <> 'Other/Remarks')"
        f" OR (item = {VENTILATOR_TYPE} AND value <> 'Other')"
        f" OR (item = {OXYGEN_DEVICE_OLD} AND value = 'Ventilator')"
    )


def _is_oxygen() -> str:
    return (
        f"(item = {OXYGEN_DEVICE} AND value IN {OXYGEN})"
        f" OR (item = {OXYGEN_DEVICE_OLD} AND value IN {OXYGEN_OLD})"
    )
