"""MMLU's subjects, and hash and row count of the files that were checked.

Hashes of the per-subject CSV files of the original release; not a data set.
"""

from __future__ import annotations

SUBJECTS: tuple[str, ...] = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_medicine",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "econometrics",
    "electrical_engineering",
    "elementary_mathematics",
    "formal_logic",
    "global_facts",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_european_history",
    "high_school_geography",
    "high_school_government_and_politics",
    "high_school_macroeconomics",
    "high_school_mathematics",
    "high_school_microeconomics",
    "high_school_physics",
    "high_school_psychology",
    "high_school_statistics",
    "high_school_us_history",
    "high_school_world_history",
    "human_aging",
    "human_sexuality",
    "international_law",
    "jurisprudence",
    "logical_fallacies",
    "machine_learning",
    "management",
    "marketing",
    "medical_genetics",
    "miscellaneous",
    "moral_disputes",
    "moral_scenarios",
    "nutrition",
    "philosophy",
    "prehistory",
    "professional_accounting",
    "professional_law",
    "professional_medicine",
    "professional_psychology",
    "public_relations",
    "security_studies",
    "sociology",
    "us_foreign_policy",
    "virology",
    "world_religions",
)

REGISTERED: dict[str, tuple[str, int]] = {
    "mmlu/test/anatomy_test.csv": (
        "966dfd5c4579885ebdb8c05d6754ae5834f672632586d8595be3c0f9360e6f4e",
        135,
    ),
    "mmlu/test/college_biology_test.csv": (
        "e1204cb9d19887ea266145f038b5d4cc1fbc33d7efce186259c4ecca1cbe3119",
        144,
    ),
    "mmlu/test/college_computer_science_test.csv": (
        "d53a1d0d1c4362dacf92a4ff1d6a755beb5a87f24a7301c3c4391fcacc6530b4",
        100,
    ),
    "mmlu/test/computer_security_test.csv": (
        "8e40f809858db9dd8585036b53984e570b6101f72be2214b85e979c7fafa307f",
        100,
    ),
    "mmlu/test/elementary_mathematics_test.csv": (
        "65a46a0e1927ea37aabd031ddcb6d81eef70a7eee1e9e0af94ec8e3fa21d728b",
        378,
    ),
    "mmlu/test/high_school_world_history_test.csv": (
        "7787343ae18e4e1ef833c8630c0c914c62f42c2f35d8b90f4bec2eecccfc161e",
        237,
    ),
    "mmlu/test/virology_test.csv": (
        "4355b9d79142da0e44a767a495a277733fd89ad67236cbbe3f42ff3a6d46b483",
        166,
    ),
    "mmlu/dev/abstract_algebra_dev.csv": (
        "bd8c73f3c75bea9db82d281d9da6949cea687b987dba24a142c638e758046624",
        5,
    ),
    "mmlu/dev/anatomy_dev.csv": (
        "0985685cf5ab13ccc1629f03a1308a9add8767582ffeb195b68b18c3415c9993",
        5,
    ),
    "mmlu/dev/astronomy_dev.csv": (
        "bb03eca519a3fbc04017dc4783635763ac928f0811ce6243dbcbf0d526dbe1e3",
        5,
    ),
    "mmlu/dev/business_ethics_dev.csv": (
        "7cd487e4ba7d9fe423bcc259ad852e963dc370629b8d61881b61ed0ae84c0b46",
        5,
    ),
    "mmlu/dev/clinical_knowledge_dev.csv": (
        "13c88c266cf2a8aa20a062e9b901ee372431e75669fa3c80865613fa2b7f61af",
        5,
    ),
    "mmlu/dev/college_biology_dev.csv": (
        "31f4ae0707ba3f742e0d5546ff970949be8a05e217921fe87b1814d6a0ab8184",
        5,
    ),
    "mmlu/dev/college_chemistry_dev.csv": (
        "9ba27ba571b8ad40d35a2a88a60acf434ca5f37962c2eba8f9d0aa89edb4c1c7",
        5,
    ),
    "mmlu/dev/college_computer_science_dev.csv": (
        "fc1a43187cd68390d663e0a1849688b13a4cd75ab17616558f4e584a4a8ae2bd",
        5,
    ),
    "mmlu/dev/college_mathematics_dev.csv": (
        "27731ee1402e720ee01ad6fa6a969a0d0978a0e9b4c385d328a61869a43f321f",
        5,
    ),
    "mmlu/dev/college_medicine_dev.csv": (
        "63928a944fda769d7e52a3a4549d4f37f094896e65e7db35029261e1ae79909b",
        5,
    ),
    "mmlu/dev/college_physics_dev.csv": (
        "6e043d6c566091c5ad1d8bc1d002900e1aa0bff114f98d5e3f2e4f645efce100",
        5,
    ),
    "mmlu/dev/computer_security_dev.csv": (
        "09e276300dbd2d07906dbe4ff82aabf45b9765f933eb7d0f35ea3ea97dee8020",
        5,
    ),
    "mmlu/dev/conceptual_physics_dev.csv": (
        "5e65be1f6fdd82f4887e3747af790a747191b1b732dd2bea76306388d5ee3719",
        5,
    ),
    "mmlu/dev/econometrics_dev.csv": (
        "7a01a925199c246decd0f1fc7a1b8dc28136b19d793e5b1e0d97142c118a2940",
        5,
    ),
    "mmlu/dev/electrical_engineering_dev.csv": (
        "5aad11b1d1c8dc1a431c3e79a047cba56d691a60403ddffaf5fbd45e9c82bc0d",
        5,
    ),
    "mmlu/dev/elementary_mathematics_dev.csv": (
        "9aca9cd215b7c170020fd5f7db1c9c3d5cbf6df9ee7b970a4810649a87245011",
        5,
    ),
    "mmlu/dev/formal_logic_dev.csv": (
        "e4b579358ed4878f6c91bfea0ccc51efdd15a28401f86da9ee8f6c0af37cf36d",
        5,
    ),
    "mmlu/dev/global_facts_dev.csv": (
        "685577fc3f0bf09a3f5c741ef062d6328aec843069862b83b64eb3638466505f",
        5,
    ),
    "mmlu/dev/high_school_biology_dev.csv": (
        "6a200085c150794846d4bab43bb0e22ceec9f99576dfc25f5c5d8faa9595ae13",
        5,
    ),
    "mmlu/dev/high_school_chemistry_dev.csv": (
        "1ba44aeea98ca22342b6525a3a9ebb62003b2a8289fa42d7c844e2139557ec5b",
        5,
    ),
    "mmlu/dev/high_school_computer_science_dev.csv": (
        "5de3800dfbbfaa89050413a765deaf774fdb0611e370951383fb50fac774663e",
        5,
    ),
    "mmlu/dev/high_school_european_history_dev.csv": (
        "a3677065cf51abc32901cdcf88ed64121f5595e3a5a67f86ae2570f866fe87c5",
        5,
    ),
    "mmlu/dev/high_school_geography_dev.csv": (
        "e43fc27b9fa8b808773a2871007b39e012a1cc1ec902f85d85cc9c27cc12883d",
        5,
    ),
    "mmlu/dev/high_school_government_and_politics_dev.csv": (
        "daf013a3eae04b5904e6a706cf0574df2c881e00d46a979cb34c6e2968ad1c90",
        5,
    ),
    "mmlu/dev/high_school_macroeconomics_dev.csv": (
        "23ed995071c47e627c4e6adbce63a9144920441abb7e69f8b4dfac5fdc4e402d",
        5,
    ),
    "mmlu/dev/high_school_mathematics_dev.csv": (
        "d7401d5cbad5ae697bfa480e35d85de8ebf1232589a3c59b010782ee49cbe18c",
        5,
    ),
    "mmlu/dev/high_school_microeconomics_dev.csv": (
        "a409b422561f1fb02e6d1bc044657cfff7779b13146edfd937d2573423c2c49b",
        5,
    ),
    "mmlu/dev/high_school_physics_dev.csv": (
        "5f008c3a44e7b14d86f6c1cbde28892fd0d97ae424e8af9901d75c4ee03972cc",
        5,
    ),
    "mmlu/dev/high_school_psychology_dev.csv": (
        "b39b304a436fa6239a4bb8c1dc4ca3693edec2876926851f3d512d1da9e280ab",
        5,
    ),
    "mmlu/dev/high_school_statistics_dev.csv": (
        "9441f8da50bfb93158d9b2645909cf1bc5837e8078c0eab923cf0fe761f7754e",
        5,
    ),
    "mmlu/dev/high_school_us_history_dev.csv": (
        "028b3c81c7be1138ad50b4afa1835773788e4557426a40abfaf132b11edab541",
        5,
    ),
    "mmlu/dev/high_school_world_history_dev.csv": (
        "b6e87a14718b0415241dfe10dd86605de5b6e5995fa57580e9e2d7c56fe147a1",
        5,
    ),
    "mmlu/dev/human_aging_dev.csv": (
        "d2439fb3c2292e7dca8244cd98dd7ca746f8424347f171345f6b396f568b0870",
        5,
    ),
    "mmlu/dev/human_sexuality_dev.csv": (
        "0da7f8f7aeb6d5a08f0413489aa5d5b84ff8ac971952ea66242762f779cb6794",
        5,
    ),
    "mmlu/dev/international_law_dev.csv": (
        "6f7f1c0191c0bcfe195d0ed39942a605012967a04d855c6482dc7e7a9f95e4d8",
        5,
    ),
    "mmlu/dev/jurisprudence_dev.csv": (
        "27533d974102031088bc5c47fc008538ab3d08ca75e127fb64ff04cdd1562da2",
        5,
    ),
    "mmlu/dev/logical_fallacies_dev.csv": (
        "4de026c2d116c381dcc1b65e91a28ba3d124398f920b0f3904ec5b641deb28f4",
        5,
    ),
    "mmlu/dev/machine_learning_dev.csv": (
        "e4b1b09985dbdc499d51a2a2e83d93ae05bfe72ea7407c18e3aa3d2ab9ce7517",
        5,
    ),
    "mmlu/dev/management_dev.csv": (
        "f75224958ab245d86c335d6886f8689247a9f83691ad63bb7ef3196641be9e52",
        5,
    ),
    "mmlu/dev/marketing_dev.csv": (
        "15b3cf450ebc11e122886a5bad41e78260228259fa184eaa4ba566bdf37f0315",
        5,
    ),
    "mmlu/dev/medical_genetics_dev.csv": (
        "70cd9ff940bef360693eeb4e05b5b8e53ad75a81d6b74a784222d4cae6dcb896",
        5,
    ),
    "mmlu/dev/miscellaneous_dev.csv": (
        "72f74676c37fe477720d8b55e84517bd21daf1fe24f99dd33f1b0a636d31782e",
        5,
    ),
    "mmlu/dev/moral_disputes_dev.csv": (
        "c80d35650189d23777fff1a4a53ff4387128c2536cbbd417d7e9103eeeb0d054",
        5,
    ),
    "mmlu/dev/moral_scenarios_dev.csv": (
        "dbe2196287f89a6c4be4f31a1897bf0d0f8612a5ab22451a856496df2e0c5100",
        5,
    ),
    "mmlu/dev/nutrition_dev.csv": (
        "84444f3a5c5bf3ccbe87f361b8dca56b9e0c5594fda2c4b558c66c37f47f5b24",
        5,
    ),
    "mmlu/dev/philosophy_dev.csv": (
        "587be220837bbe089702aa27cda03fbf72a7b959a9a4425e70d598026614cf11",
        5,
    ),
    "mmlu/dev/prehistory_dev.csv": (
        "f62e146bc64a3335bafde9af63b43e4a863246da743cd49f6daf5d5e9614ff81",
        5,
    ),
    "mmlu/dev/professional_accounting_dev.csv": (
        "efc070ed71676829c67497542e3571f50a868036a17f93d00a56a4f85767ae0d",
        5,
    ),
    "mmlu/dev/professional_law_dev.csv": (
        "15d8589900ccf4725e1bad17837d48cc18c8bf033cd9b5d6bacf28a2a8f1064f",
        5,
    ),
    "mmlu/dev/professional_medicine_dev.csv": (
        "486456d578890d4700dd8044ac236c8ac2ee3389e35fc81ac37529f4f4487785",
        5,
    ),
    "mmlu/dev/professional_psychology_dev.csv": (
        "222e690db42dfb217a7c56a6ac693b73cf0168e344d75f28618c62ad9d2c0261",
        5,
    ),
    "mmlu/dev/public_relations_dev.csv": (
        "8895f665f4c696ae76d34210546d0ab4b21b79d2fd8534cd2e8002e8ed0969dc",
        5,
    ),
    "mmlu/dev/security_studies_dev.csv": (
        "c726278f37ce15489b22190771041bd459065016e3891148ef147ae7cf1a0c35",
        5,
    ),
    "mmlu/dev/sociology_dev.csv": (
        "2e2bb34b4cabdc50e2c43097d1cfe91560224f9e1224adc19a01e922d1c49414",
        5,
    ),
    "mmlu/dev/us_foreign_policy_dev.csv": (
        "3a9677a89fd67c3a891671a2a6a14ff69ab37bdd54fb687c2f8334c8a3fa1543",
        5,
    ),
    "mmlu/dev/virology_dev.csv": (
        "30af41f604f2ee7f5585361df6a7022b4eaf126eeb91494f225841908f06034a",
        5,
    ),
    "mmlu/dev/world_religions_dev.csv": (
        "d4f7550bb8a32a599dc2ffa0a53e85e81096f441bcca1be3a412d690ade8eaa0",
        5,
    ),
}
"""Path below a mirror -> sha256, rows."""
