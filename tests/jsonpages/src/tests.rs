// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Planted pages, output and baselines.

use crate::{merged_baseline, JsonPages};

const PAGE: &str = "\
`saw cut` prints [`Board`](#board).

Each other verb of `saw` prints [`Answer`](#answer).

### `Board`

A board.

| field | type | meaning |
|---|---|---|
| `length` | number | Its length \\| more. |
| `owner` | text or null, or missing | The owner. |
| `cuts` | list of [`Cut`](#cut) | Cuts. |
| `ages` | object, number by text | Ages. |
| those of [`Wood`](other.md#wood) |  | Its wood. |

### `Cut`

| `is` | meaning | further fields |
|---|---|---|
| `along` | Along. | `depth`: Depth (of it); or none (number); `by`: Who ([`Wood`](other.md#wood) or null) |
| `none` | None. |  |

### `Answer`

| key | meaning | value |
|---|---|---|
| `done` | Done. |  |
| `seconds` | A time. | number |
| `failed` | Failed. | `why`: The reason (text) |
";

const OTHER: &str = "\
### `Wood`

| field | type | meaning |
|---|---|---|
| `wood` | [`WoodKind`](#woodkind) | Kind. |

### `WoodKind`

| text | meaning |
|---|---|
| `oak` | Oak. |
";

/// The type of a command that failed.
const ANSWERS: &str = "\
### `Failure`

| field | type | meaning |
|---|---|---|
| `message` | text | Reason. |
";

const BOARD: &str = "{\"json_version\":1,\"length\":1,\"cuts\":[{\"is\":\"along\",\"depth\":2,\"by\":null},{\"is\":\"none\"}],\
                     \"ages\":{\"a\":1},\"wood\":\"oak\"}";

fn pages(page: &str) -> JsonPages {
    let pages = [
        ("a.md", page),
        ("other.md", OTHER),
        ("json-answers.md", ANSWERS),
    ];
    JsonPages::of(&pages).expect("pages")
}

#[test]
fn output_as_on_the_pages_is_no_complaint() {
    let pages = pages(PAGE);
    assert_eq!(pages.complaints("saw cut", BOARD), [""; 0]);
    let list = format!("[{BOARD},{BOARD}]\n{BOARD}\n");
    assert_eq!(pages.complaints("saw cut", &list), [""; 0]);
    let failed = "{\"json_version\":1,\"error\":{\"message\":\"no\"}}";
    assert_eq!(pages.complaints("saw cut", failed), [""; 0]);
    assert_eq!(pages.verbs("saw").into_iter().collect::<Vec<_>>(), ["cut"]);
}

#[test]
fn a_command_is_found_in_its_line() {
    let pages = pages(&PAGE.replace("`saw cut` prints", "`saw cut TREE --fine` prints"));
    for (line, command) in [
        ("--json cut a", "saw cut"),
        ("cut a --fine --json", "saw cut --fine"),
        ("fine cut", "saw fine"),
    ] {
        assert_eq!(pages.command("saw", line), command);
    }
}

#[test]
fn planted_faults_of_output_are_found() {
    let pages = pages(PAGE);
    for (from, to, complaint) in [
        (
            "\"length\":1",
            "\"length\":1,\"planted\":2",
            "planted: no page has the key",
        ),
        ("\"length\":1,", "", "length: the key is missing"),
        (
            "\"length\":1",
            "\"length\":\"1\"",
            "length: \"1\" is not of the kind number",
        ),
        (
            "\"depth\":2",
            "\"depth\":2,\"planted\":2",
            "cuts[0].planted: no page has the key",
        ),
        ("\"depth\":2,", "", "cuts[0].depth: the key is missing"),
        (
            "\"none\"",
            "\"planted\"",
            "cuts[1].is: Some(\"planted\") is no variant",
        ),
        ("oak", "planted", "wood: \"planted\" is no word"),
        ("\"a\":1", "\"a\":null", "ages.a: null is not of the kind"),
        ("\"json_version\":1,", "", "json_version is None"),
        (
            "\"json_version\":1,",
            "\"json_version\":2,",
            "json_version is Some",
        ),
        ("{\"json_version\"", "3{", "no JSON"),
    ] {
        let planted = BOARD.replace(from, to);
        let complaints = pages.complaints("saw cut", &planted).join("\n");
        assert!(complaints.contains(complaint), "{planted}: {complaints}");
    }
    let other = pages.complaints("plane", BOARD).join("\n");
    assert!(other.contains("no page says what plane prints"), "{other}");
}

#[test]
fn a_variant_is_a_text_or_an_object_with_one_key() {
    let pages = pages(&PAGE.replace(
        "| `length` | number |",
        "| `length` | [`Answer`](#answer) |",
    ));
    for (value, is_good) in [
        ("\"done\"", true),
        ("{\"seconds\":3}", true),
        ("{\"failed\":{\"why\":\"so\"}}", true),
        ("{\"done\":null}", false),
        ("\"seconds\"", false),
        ("{\"failed\":{}}", false),
        ("{\"failed\":{\"why\":\"so\",\"planted\":1}}", false),
        ("{\"planted\":1}", false),
    ] {
        let text = BOARD.replace("\"length\":1", &format!("\"length\":{value}"));
        let complaints = pages.complaints("saw cut", &text);
        assert_eq!(complaints.is_empty(), is_good, "{value}: {complaints:?}");
    }
}

#[test]
fn samples_are_as_on_the_pages() {
    let pages = pages(PAGE);
    let samples = pages.samples("a.md#Board", &|key| format!("the {key}"));
    // Both variants of the cut, with all keys and with the fewest.
    assert_eq!(samples.len(), 4);
    assert_eq!(samples[0]["owner"], "the owner");
    assert_eq!(samples[1]["cuts"][0]["is"], "none");
    assert!(samples[2].get("owner").is_none());
    for mut sample in samples {
        sample["json_version"] = 1.into();
        assert_eq!(pages.complaints("saw cut", &sample.to_string()), [""; 0]);
    }
    assert_eq!(pages.samples("a.md#Cut", &|_| String::new()).len(), 4);
}

#[test]
fn a_baseline_keeps_what_it_has() {
    let old = merged_baseline("# A comment\n", &pages(PAGE).difference("").added);
    assert!(old.starts_with("# A comment\n"), "{old}");
    for line in [
        "`saw cut` prints a.md#Board\n",
        "a.md#Board length: number\n",
        "a.md#Board owner: text or null, or missing\n",
        "a.md#Board those of other.md#Wood\n",
        "a.md#Cut is = along, by: other.md#Wood or null\n",
        "a.md#Answer = failed, why: text\n",
        "other.md#WoodKind = oak\n",
    ] {
        assert!(old.contains(line), "{line}: {old}");
    }
    let same = pages(PAGE).difference(&old);
    assert!(same.gone.is_empty() && same.added.is_empty(), "{same:?}");
    for (from, to, gone) in [
        (
            "| `length` | number | Its length \\| more. |\n",
            "",
            "a.md#Board length: number",
        ),
        (
            "| `length` | number",
            "| `length` | text",
            "a.md#Board length: number",
        ),
        ("| `done` | Done. |  |\n", "", "a.md#Answer = done"),
        (
            "`saw cut` prints",
            "`saw off` prints",
            "`saw cut` prints a.md#Board",
        ),
    ] {
        let found = pages(&PAGE.replace(from, to)).difference(&old).gone;
        assert_eq!(found.first().map_or("", String::as_str), gone, "{from}");
    }
    let more = PAGE.replace("| `ages`", "| `more` | number | More. |\n| `ages`");
    let found = pages(&more).difference(&old);
    assert_eq!((found.gone.len(), found.added.len()), (0, 1));
    assert!(merged_baseline(&old, &found.added).contains("a.md#Board more: number\n"));
}

#[test]
fn a_page_that_is_not_understood_is_an_error() {
    for (from, to) in [
        ("| number | Its", "| planted | Its"),
        ("| field | type |", "| planted | type |"),
        ("(number); `by`", "(planted); `by`"),
        ("[`Cut`](#cut)", "[`Cut`](#planted)"),
    ] {
        let planted = PAGE.replace(from, to);
        assert_ne!(planted, PAGE);
        assert!(JsonPages::of(&[("a.md", &planted)]).is_err(), "{from}");
    }
}
