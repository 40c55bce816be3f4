"""The clinical catalogue behind the synthetic cohort: conditions, how notes word them, and what
they do.

Every entry holds three kinds of facts: words (phrasings that a note may choose between), log-odds
of in-hospital death, and the rows that the same condition leaves in the hospital's tables (ICD-9
codes without dots, procedures, days of stay, ventilation). The figures are plausible orders of
magnitude, not estimates from patients.

Invariant: whatever changes the risk of death has words of its own, and a note always uses one of
them, so that the risk given the note is the risk given the latent conditions. No phrase here may
say how the stay ended.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Acute:
    """A reason for admission. `story` completes "67 y/o M with HTN who ..."."""

    name: str
    frequency: float  # relative
    risk: float  # log-odds of death, before severity
    ages: tuple[int, int]
    service: str
    headline: str  # ADMISSIONS.DIAGNOSIS
    complaint: tuple[str, ...]
    story: tuple[str, ...]
    finding: tuple[str, ...]  # physical exam
    imaging: tuple[str, str, tuple[str, ...]]  # exam code, exam name, impressions
    course: tuple[str, ...]
    codes: tuple[str, ...]
    procedures: tuple[tuple[str, float], ...]  # ICD-9 procedure, probability
    stay: float  # median days of a survivor with moderate severity
    ventilation: float  # probability at critical severity


@dataclass(frozen=True, kw_only=True)
class Chronic:
    """A condition of the past medical history; it stays with the patient."""

    name: str
    frequency: float  # probability at age 75
    risk: float
    phrase: tuple[str, ...]
    medication: tuple[str, ...]
    codes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Complication:
    """An organ failure found on arrival; its probability grows with severity."""

    name: str
    frequency: tuple[float, float, float]  # stable, serious, critical
    risk: float
    phrase: tuple[str, ...]
    codes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Severity:
    """How ill the patient is on arrival, in words that all acute conditions share."""

    name: str
    frequency: float
    risk: float
    phrase: tuple[str, ...]
    appearance: tuple[str, ...]
    pressure: tuple[int, int]  # systolic range
    pulse: tuple[int, int]
    stay: float  # multiplies the condition's median stay


SEVERITIES = (
    Severity(
        name="stable",
        frequency=0.46,
        risk=-1.8,
        phrase=(
            "In the ED was hemodynamically stable",
            "VSS on arrival, given IVF with good response",
            "Was stable and went to the floor",
            "Vitals were unremarkable in the ED",
        ),
        appearance=(
            "NAD, A&Ox3",
            "comfortable, conversant",
            "well appearing, no distress",
            "pleasant, alert",
        ),
        pressure=(112, 152),
        pulse=(62, 92),
        stay=0.7,
    ),
    Severity(
        name="serious",
        frequency=0.32,
        risk=0.4,
        phrase=(
            "Required oxygen by NRB and close monitoring",
            "Was tachycardic, lactate 3.2, sent to the step down unit",
            "Became tachypneic and was admitted to the unit",
            "Received 3L IVF for borderline pressures",
        ),
        appearance=(
            "ill appearing, tachypneic",
            "lethargic but arousable",
            "uncomfortable, diaphoretic",
        ),
        pressure=(94, 122),
        pulse=(88, 118),
        stay=1.0,
    ),
    Severity(
        name="critical",
        frequency=0.22,
        risk=2.6,
        phrase=(
            "Was hypotensive on levophed and vasopressin",
            "Intubated for airway protection and started on pressors",
            "Found unresponsive, intubated in the field",
            "Arrived in shock, lactate 8.4, two pressors",
        ),
        appearance=(
            "intubated, sedated, cool extremities",
            "unresponsive, mottled skin",
            "obtunded, intubated",
        ),
        pressure=(68, 92),
        pulse=(112, 146),
        stay=1.7,
    ),
)

ACUTE = (
    Acute(
        name="sepsis",
        frequency=1.5,
        risk=0.8,
        ages=(40, 97),
        service="MEDICINE",
        headline="SEPSIS",
        complaint=("fever and hypotension", "sepsis", "fevers, chills"),
        story=(
            "presents with fever and rigors, concern for urosepsis",
            "was sent from NH with fever, found to have sepsis",
            "p/w septic picture with positive blood cultures",
        ),
        finding=("Skin warm, flushed", "Febrile with rigors"),
        imaging=(
            "C11",
            "CHEST (PORTABLE AP)",
            ("No focal consolidation.", "Low lung volumes without consolidation."),
        ),
        course=(
            "Sepsis: treated with vancomycin and zosyn",
            "Sepsis: cultures grew gram negative rods",
        ),
        codes=("0389", "99592", "78552", "5990"),
        procedures=(("3893", 0.6),),
        stay=8.0,
        ventilation=0.6,
    ),
    Acute(
        name="pneumonia",
        frequency=1.4,
        risk=0.2,
        ages=(30, 97),
        service="MEDICINE",
        headline="PNEUMONIA",
        complaint=("cough and dyspnea", "shortness of breath", "productive cough"),
        story=(
            "presents with productive cough and fever, CXR with RLL pneumonia",
            "c/o cough and SOB for 3 days, found to have PNA",
            "p/w dyspnea and multifocal pneumonia",
        ),
        finding=("Lungs: crackles at right base", "Lungs: rhonchi bilaterally"),
        imaging=(
            "C11",
            "CHEST (PA & LAT)",
            ("Right lower lobe pneumonia.", "Multifocal opacities concerning for pneumonia."),
        ),
        course=(
            "Pneumonia: treated with ceftriaxone and azithromycin",
            "PNA: completed a course of levofloxacin",
        ),
        codes=("486", "51881"),
        procedures=(("3324", 0.2),),
        stay=6.0,
        ventilation=0.8,
    ),
    Acute(
        name="heart failure",
        frequency=1.3,
        risk=0.1,
        ages=(50, 97),
        service="CARDIOLOGY",
        headline="CONGESTIVE HEART FAILURE",
        complaint=("dyspnea on exertion", "leg swelling", "shortness of breath"),
        story=(
            "presents with orthopnea and leg edema c/w CHF exacerbation",
            "c/o weight gain and worsening DOE, found to be volume overloaded",
        ),
        finding=("JVP elevated, 2+ edema", "Bibasilar crackles, pitting edema"),
        imaging=(
            "C11",
            "CHEST (PORTABLE AP)",
            ("Moderate pulmonary edema.", "Cardiomegaly with bilateral effusions."),
        ),
        course=("CHF: diuresed with IV lasix", "Heart failure: treated with a lasix drip"),
        codes=("42823", "4280"),
        procedures=(("8872", 0.5),),
        stay=5.5,
        ventilation=0.5,
    ),
    Acute(
        name="myocardial infarction",
        frequency=1.1,
        risk=0.0,
        ages=(42, 94),
        service="CARDIOLOGY",
        headline="MYOCARDIAL INFARCTION",
        complaint=("chest pain", "substernal chest pressure"),
        story=(
            "presents with chest pain, found to have NSTEMI",
            "c/o crushing chest pressure, EKG with ST elevations, taken to cath lab",
        ),
        finding=("RRR, no murmurs", "S3 gallop present"),
        imaging=(
            "C11",
            "CHEST (PORTABLE AP)",
            ("Mild vascular congestion.", "No acute cardiopulmonary process."),
        ),
        course=("MI: underwent cath with stent to LAD", "NSTEMI: treated with heparin and plavix"),
        codes=("41071", "41401"),
        procedures=(("0066", 0.6), ("3722", 0.8), ("8856", 0.8)),
        stay=4.0,
        ventilation=0.5,
    ),
    Acute(
        name="gastrointestinal bleed",
        frequency=1.1,
        risk=-0.2,
        ages=(35, 95),
        service="MEDICINE",
        headline="GASTROINTESTINAL BLEED",
        complaint=("melena", "hematemesis", "BRBPR"),
        story=(
            "presents with melena and HCT drop, concern for UGIB",
            "p/w hematemesis, transfused 2U PRBC for GI bleed",
        ),
        finding=("Rectal: guaiac positive stool", "Pale, melena on rectal"),
        imaging=("C20", "CT ABDOMEN W/CONTRAST", ("No active extravasation.", "No free air.")),
        course=("GIB: EGD showed a gastric ulcer", "GI bleed: treated with pantoprazole drip"),
        codes=("53140", "2851"),
        procedures=(("4443", 0.5), ("9904", 0.7)),
        stay=4.5,
        ventilation=0.3,
    ),
    Acute(
        name="intracranial haemorrhage",
        frequency=0.9,
        risk=1.5,
        ages=(40, 95),
        service="NEUROSURGERY",
        headline="INTRACRANIAL HEMORRHAGE",
        complaint=("headache and vomiting", "found down", "intracranial hemorrhage"),
        story=(
            "presents with sudden headache, CT head with large intracranial hemorrhage",
            "was found down, head CT showed ICH with midline shift",
        ),
        finding=("Neuro: left hemiplegia, pupils sluggish", "Neuro: does not follow commands"),
        imaging=(
            "C30",
            "CT HEAD W/O CONTRAST",
            ("Large intraparenchymal hemorrhage with shift.", "Stable hemorrhage."),
        ),
        course=("ICH: followed with serial head CTs", "Hemorrhage: neurosurgery was consulted"),
        codes=("431", "3484"),
        procedures=(("0131", 0.3), ("0221", 0.2)),
        stay=9.0,
        ventilation=0.9,
    ),
    Acute(
        name="ischaemic stroke",
        frequency=0.8,
        risk=0.4,
        ages=(45, 97),
        service="NEUROLOGY",
        headline="STROKE",
        complaint=("slurred speech", "right sided weakness", "facial droop"),
        story=(
            "presents with acute weakness and aphasia, MRI with MCA stroke",
            "had sudden facial droop and slurred speech, given tPA for CVA",
        ),
        finding=("Neuro: right facial droop, arm drift", "Neuro: aphasic, weak on right"),
        imaging=(
            "C31",
            "MR HEAD W/O CONTRAST",
            ("Acute infarct in the MCA territory.", "Evolving infarct."),
        ),
        course=("Stroke: started on aspirin and statin", "CVA: evaluated by PT and speech therapy"),
        codes=("43491", "78459"),
        procedures=(("9910", 0.3),),
        stay=6.0,
        ventilation=0.5,
    ),
    Acute(
        name="hip fracture",
        frequency=1.0,
        risk=-1.0,
        ages=(60, 97),
        service="ORTHOPAEDICS",
        headline="HIP FRACTURE",
        complaint=("hip pain s/p fall", "mechanical fall", "right hip fracture"),
        story=(
            "had a mechanical fall with right hip fracture",
            "tripped at home, films with femoral neck fx",
        ),
        finding=("Ext: leg shortened and externally rotated", "Ext: hip tender, NV intact"),
        imaging=(
            "C40",
            "HIP UNILAT MIN 2 VIEWS",
            ("Displaced femoral neck fracture.", "Intertrochanteric fracture."),
        ),
        course=("Hip: went to the OR for hemiarthroplasty", "Fracture: ORIF without complication"),
        codes=("82021", "E8859"),
        procedures=(("8152", 0.5), ("7935", 0.4)),
        stay=5.0,
        ventilation=0.3,
    ),
    Acute(
        name="diabetic ketoacidosis",
        frequency=1.0,
        risk=-1.6,
        ages=(18, 60),
        service="MEDICINE",
        headline="DIABETIC KETOACIDOSIS",
        complaint=("nausea, vomiting", "hyperglycemia", "DKA"),
        story=(
            "presents with nausea and polyuria, glucose 540 with anion gap, in DKA",
            "ran out of insulin, found in diabetic ketoacidosis",
        ),
        finding=("Dry mucous membranes", "Kussmaul breathing, fruity breath"),
        imaging=("C11", "CHEST (PA & LAT)", ("No acute cardiopulmonary process.", "Clear lungs.")),
        course=("DKA: insulin drip until gap closed", "DKA: transitioned to lantus"),
        codes=("25013", "2765"),
        procedures=(("3893", 0.2),),
        stay=3.0,
        ventilation=0.2,
    ),
    Acute(
        name="liver failure",
        frequency=0.9,
        risk=1.0,
        ages=(35, 75),
        service="MEDICINE",
        headline="LIVER FAILURE",
        complaint=("confusion, jaundice", "abdominal distension", "altered mental status"),
        story=(
            "presents with worsening jaundice and ascites, decompensated liver failure",
            "was brought in confused with hepatic encephalopathy, MELD 34",
        ),
        finding=("Jaundiced, asterixis, ascites", "Icteric sclera, distended abdomen"),
        imaging=(
            "C21",
            "US ABDOMEN COMPLETE",
            ("Cirrhotic liver with large ascites.", "Patent portal vein."),
        ),
        course=("Liver: lactulose and rifaximin were given", "Ascites: paracentesis of 5L"),
        codes=("5722", "5712", "78959"),
        procedures=(("5491", 0.7),),
        stay=9.0,
        ventilation=0.6,
    ),
    Acute(
        name="cardiac arrest",
        frequency=0.6,
        risk=1.9,
        ages=(35, 92),
        service="CCU",
        headline="CARDIAC ARREST",
        complaint=("cardiac arrest", "s/p PEA arrest", "VF arrest"),
        story=(
            "collapsed at home, PEA arrest with ROSC after 20 minutes of CPR",
            "had a witnessed cardiac arrest, shocked for VF, cooled",
        ),
        finding=("Neuro: no corneal reflex, myoclonus", "Pupils fixed, no gag"),
        imaging=(
            "C30",
            "CT HEAD W/O CONTRAST",
            ("Loss of grey-white differentiation.", "No hemorrhage."),
        ),
        course=("Arrest: cooled per protocol", "Arrest: EEG showed diffuse slowing"),
        codes=("4275", "3481"),
        procedures=(("9960", 0.6), ("9981", 0.5)),
        stay=8.0,
        ventilation=0.95,
    ),
    Acute(
        name="pancreatitis",
        frequency=0.7,
        risk=-0.6,
        ages=(25, 85),
        service="SURGERY",
        headline="PANCREATITIS",
        complaint=("epigastric pain", "abdominal pain"),
        story=(
            "presents with epigastric pain, lipase 2400, c/w pancreatitis",
            "c/o abdominal pain after EtOH binge, found to have acute pancreatitis",
        ),
        finding=("Abd: epigastric tenderness, no rebound", "Abd: soft, tender, distended"),
        imaging=(
            "C20",
            "CT ABDOMEN W/CONTRAST",
            ("Peripancreatic stranding.", "Acute pancreatitis without necrosis."),
        ),
        course=("Pancreatitis: kept NPO with IVF", "Pancreatitis: diet was advanced"),
        codes=("5770", "5779"),
        procedures=(("5110", 0.2),),
        stay=6.5,
        ventilation=0.4,
    ),
    Acute(
        name="overdose",
        frequency=0.8,
        risk=-1.8,
        ages=(18, 65),
        service="MEDICINE",
        headline="OVERDOSE",
        complaint=("overdose", "suicide attempt", "ingestion"),
        story=(
            "took a bottle of tylenol in a suicide attempt, given NAC",
            "was found with empty pill bottles after benzodiazepine overdose",
        ),
        finding=("Pupils pinpoint", "Psych: flat affect"),
        imaging=("C11", "CHEST (PORTABLE AP)", ("No aspiration.", "Clear lungs.")),
        course=(
            "Overdose: seen by psychiatry with 1:1 sitter",
            "Ingestion: NAC protocol completed",
        ),
        codes=("9654", "9694", "E9500"),
        procedures=(("9604", 0.2),),
        stay=2.5,
        ventilation=0.6,
    ),
    Acute(
        name="pulmonary embolism",
        frequency=0.7,
        risk=-0.1,
        ages=(28, 90),
        service="MEDICINE",
        headline="PULMONARY EMBOLIS",
        complaint=("pleuritic chest pain", "acute dyspnea"),
        story=(
            "presents with pleuritic pain, CTA with saddle pulmonary embolism",
            "c/o calf swelling and dyspnea, found to have bilateral PE",
        ),
        finding=("Right calf swollen and tender", "Loud P2, clear lungs"),
        imaging=(
            "C22",
            "CTA CHEST W&W/O C&RECONS",
            ("Bilateral pulmonary emboli.", "Saddle embolus with RV strain."),
        ),
        course=("PE: heparin bridged to coumadin", "PE: TTE showed RV strain"),
        codes=("41519", "45340"),
        procedures=(("387", 0.2), ("8872", 0.5)),
        stay=5.0,
        ventilation=0.3,
    ),
    Acute(
        name="bowel obstruction",
        frequency=0.8,
        risk=-0.9,
        ages=(30, 92),
        service="SURGERY",
        headline="SMALL BOWEL OBSTRUCTION",
        complaint=("abdominal pain, emesis", "no flatus for two days"),
        story=(
            "presents with bilious emesis, CT with SBO and transition point",
            "c/o crampy pain and obstipation, found to have small bowel obstruction",
        ),
        finding=("Abd: distended, high pitched bowel sounds", "Abd: tympanitic, well healed scar"),
        imaging=(
            "C20",
            "CT ABDOMEN W/O CONTRAST",
            ("Dilated loops with transition point.", "Partial obstruction."),
        ),
        course=("SBO: NGT decompression", "SBO: exploratory laparotomy with lysis of adhesions"),
        codes=("56081", "5601"),
        procedures=(("5459", 0.5), ("9607", 0.5)),
        stay=6.0,
        ventilation=0.3,
    ),
    Acute(
        name="meningitis",
        frequency=0.4,
        risk=0.0,
        ages=(18, 80),
        service="NEUROLOGY",
        headline="MENINGITIS",
        complaint=("headache, neck stiffness", "fever and photophobia"),
        story=(
            "presents with fever and neck stiffness, LP c/w bacterial meningitis",
            "c/o headache and photophobia, CSF with 1200 WBC",
        ),
        finding=("Neck: rigid, Kernig positive", "Neuro: photophobic, nonfocal"),
        imaging=(
            "C30",
            "CT HEAD W/O CONTRAST",
            ("No acute intracranial process.", "No mass effect."),
        ),
        course=("Meningitis: ceftriaxone and acyclovir", "Meningitis: CSF culture negative"),
        codes=("0479", "3209"),
        procedures=(("0331", 0.9),),
        stay=7.0,
        ventilation=0.4,
    ),
)

CHRONIC = (
    Chronic(
        name="metastatic cancer",
        frequency=0.13,
        risk=1.7,
        phrase=(
            "metastatic lung cancer",
            "colon CA with liver mets",
            "stage IV breast cancer, metastatic to bone",
        ),
        medication=("oxycontin 20 mg BID", "dexamethasone 4 mg daily"),
        codes=("1977", "1629"),
    ),
    Chronic(
        name="cirrhosis",
        frequency=0.08,
        risk=0.9,
        phrase=("EtOH cirrhosis", "HCV cirrhosis with varices"),
        medication=("lactulose 30 ml TID", "nadolol 20 mg daily"),
        codes=("5715",),
    ),
    Chronic(
        name="end-stage renal disease",
        frequency=0.1,
        risk=0.6,
        phrase=("ESRD on HD", "end stage renal disease on dialysis"),
        medication=("sevelamer 800 mg TID", "nephrocaps daily"),
        codes=("5856", "V4511"),
    ),
    Chronic(
        name="dementia",
        frequency=0.12,
        risk=0.6,
        phrase=("advanced dementia", "Alzheimer's dementia"),
        medication=("donepezil 10 mg qhs", "memantine 10 mg BID"),
        codes=("2948",),
    ),
    Chronic(
        name="HIV",
        frequency=0.04,
        risk=0.5,
        phrase=("HIV with low CD4", "HIV/AIDS"),
        medication=("truvada daily", "bactrim DS daily"),
        codes=("042",),
    ),
    Chronic(
        name="chronic obstructive pulmonary disease",
        frequency=0.22,
        risk=0.4,
        phrase=("COPD on home O2", "COPD"),
        medication=("albuterol inhaler prn", "spiriva daily"),
        codes=("496",),
    ),
    Chronic(
        name="atrial fibrillation",
        frequency=0.28,
        risk=0.1,
        phrase=("atrial fibrillation", "afib on coumadin"),
        medication=("coumadin 5 mg daily", "digoxin 0.125 mg daily"),
        codes=("42731", "V5861"),
    ),
    Chronic(
        name="coronary artery disease",
        frequency=0.35,
        risk=0.1,
        phrase=("CAD s/p CABG", "CAD"),
        medication=("aspirin 81 mg daily", "metoprolol 25 mg BID"),
        codes=("41401", "4140"),
    ),
    Chronic(
        name="hypertension",
        frequency=0.6,
        risk=0.0,
        phrase=("HTN", "hypertension"),
        medication=("lisinopril 10 mg daily", "amlodipine 5 mg daily"),
        codes=("4019",),
    ),
    Chronic(
        name="diabetes",
        frequency=0.33,
        risk=0.0,
        phrase=("DM2", "type 2 diabetes"),
        medication=("metformin 500 mg BID", "glipizide 5 mg daily"),
        codes=("25000",),
    ),
    Chronic(
        name="hyperlipidaemia",
        frequency=0.4,
        risk=-0.1,
        phrase=("hyperlipidemia", "HLD"),
        medication=("simvastatin 20 mg daily", "atorvastatin 40 mg daily"),
        codes=("2724",),
    ),
    Chronic(
        name="depression",
        frequency=0.18,
        risk=0.0,
        phrase=("depression", "anxiety and depression"),
        medication=("sertraline 50 mg daily", "citalopram 20 mg daily"),
        codes=("311",),
    ),
    Chronic(
        name="hypothyroidism",
        frequency=0.14,
        risk=0.0,
        phrase=("hypothyroidism",),
        medication=("levothyroxine 75 mcg daily",),
        codes=("2449",),
    ),
    Chronic(
        name="reflux",
        frequency=0.25,
        risk=0.0,
        phrase=("GERD", "reflux"),
        medication=("omeprazole 20 mg daily", "pantoprazole 40 mg daily"),
        codes=("53081",),
    ),
)

COMPLICATIONS = (
    Complication(
        name="acute kidney injury",
        frequency=(0.1, 0.3, 0.5),
        risk=0.7,
        phrase=(
            "Labs notable for Cr 3.8",
            "Found to have acute renal failure",
            "Oliguric with AKI",
        ),
        codes=("5849",),
    ),
    Complication(
        name="coagulopathy",
        frequency=(0.02, 0.08, 0.2),
        risk=1.0,
        phrase=("INR 4.2 with DIC", "Coagulopathic, platelets 24"),
        codes=("2866",),
    ),
    Complication(
        name="rapid atrial fibrillation",
        frequency=(0.05, 0.12, 0.15),
        risk=0.1,
        phrase=("Noted to be in RVR", "Went into rapid afib"),
        codes=("42731",),
    ),
)

# Words that look like conditions but say nothing about the outcome.
DENIALS = (
    "Denies chest pain, fever",
    "No cough, no dysuria",
    "Denies LOC or head strike",
    "No recent travel or sick contacts",
    "ROS otherwise negative",
    "No weight loss or night sweats",
)
OLD_HISTORY = (
    "h/o remote stroke",
    "s/p appendectomy",
    "prior GI bleed years ago",
    "s/p hip fracture repair",
    "h/o PNA",
    "s/p cholecystectomy",
    "gout",
    "osteoarthritis",
)
FAMILY = (
    "Father with MI",
    "Mother died of lung cancer",
    "Non-contributory",
    "Brother with diabetes",
    "Sister had stroke",
    "Father died of cirrhosis",
    "No history of early CAD",
)
SOCIAL = (
    "Lives with wife",
    "Lives alone, retired",
    "Nursing home resident",
    "Smokes 1 ppd",
    "Former smoker, no EtOH",
    "Denies tobacco, alcohol or drugs",
    "Works as a teacher",
    "Drinks 6 beers a day",
)
ALLERGIES = (
    "No Known Allergies",
    "No Known Allergies / Adverse Drug Reactions",
    "NKDA",
    "Penicillins",
    "Sulfa",
    "Codeine",
)


def age_risk(age: int) -> float:
    """Log-odds of death by age in years."""
    if age < 50:
        return -0.5
    if age < 65:
        return 0.0
    if age < 80:
        return 0.3
    return 0.8
