"""Words, F1 and exact match against figures worked out by hand, and numbers as languages write them."""

import unicodedata
from decimal import Decimal

import pytest

from clients.normalise import answer_words, exact_match, f1, last_number, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The North-Sea, in 1953!", ["the", "northsea", "in", "1953"]),
        ("  two \t spaces\n", ["two", "spaces"]),
        ("$5 + 3", ["5", "3"]),
        ("iPhone手机2008年", ["iphone", "手", "机", "2008", "年"]),
        ("「北京」，2008 年。", ["北", "京", "2008", "年"]),
        ("ＡＢＣ１２", ["abc12"]),
        ("東京タワーへ", ["東", "京", "タ", "ワ", "ー", "へ"]),
        ("ﾀﾜｰ", ["タ", "ワ", "ー"]),
        ("ไป 10 วัน", ["ไ", "ป", "10", "ว", "ั", "น"]),
        ("서울 특별시", ["서울", "특별시"]),
        ("¿Qué?", ["qué"]),
        ("", []),
        (" \n", []),
        ("...", ["..."]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_marks_that_combine_equal_whole_letters() -> None:
    whole = "tiếng Việt"
    apart = unicodedata.normalize("NFD", whole)
    assert apart != whole
    assert words(apart) == ["tiếng", "việt"]


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("the end of a theatre", "en", ["end", "of", "theatre"]),
        ("the end", "en_us", ["end"]),
        ("the end", "vi", ["the", "end"]),
        ("Cái đẹp của những ngôi nhà là gì", "vi", ["đẹp", "ngôi", "nhà", "gì"]),
        ("los gatos y la luna", "es", ["gatos", "y", "luna"]),
        ("der Hut des Mannes", "de", ["hut", "mannes"]),
        ("the 的", "zh", ["the", "的"]),
        ("The The", "en", ["the", "the"]),
        ("", "en", []),
    ],
)
def test_articles_of_the_language_are_left_out(text: str, language: str, expected: list[str]) -> None:
    assert answer_words(text, language) == expected


@pytest.mark.parametrize(
    ("answer", "accepted", "language", "expected"),
    [
        ("The Red River.", ["red river"], "en", 1.0),
        # 2 of 3 words found are right, 2 of 2 expected: 2 * (2/3) * 1 / (2/3 + 1)
        ("red river delta", ["the Red River"], "en", 4 / 5),
        ("river river", ["river"], "en", 2 / 3),  # once is right
        ("river", ["river river"], "en", 2 / 3),
        ("river red", ["red river"], "en", 1.0),
        ("sea", ["red river"], "en", 0.0),
        ("", ["red river"], "en", 0.0),
        ("the", ["red river"], "en", 0.0),
        ("A", ["a"], "en", 1.0),
        ("", ["a"], "en", 0.0),
        ("red river", ["blue sky", "red", "red river bank"], "en", 4 / 5),  # 2/3 for the second, 4/5 for the third
        ("sông Hồng của Việt Nam", ["sông Hồng"], "vi", 2 * 2 / (4 + 2)),
        # 北 京 2008 年 against 2008 年: 2 of 4, 2 of 2
        ("北京2008年", ["2008 年"], "zh", 2 * 2 / (4 + 2)),
        # iphone 手 机 against 苹 果 iphone 手 机: 3 of 3, 3 of 5
        ("iPhone手机", ["苹果 iPhone 手机"], "zh", 2 * 3 / (3 + 5)),
        ("iPhone4手机", ["iPhone 手机"], "zh", 2 * 2 / (3 + 3)),
        ("１９４９年", ["1949年"], "zh", 1.0),
    ],
)
def test_f1(answer: str, accepted: list[str], language: str, expected: float) -> None:
    assert f1(answer, accepted, language) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "accepted", "language", "expected"),
    [
        ("The Red River.", ["red river"], "en", 1.0),
        ("river red", ["red river"], "en", 0.0),
        ("red", ["blue", "Red"], "en", 1.0),
        ("《红楼梦》", ["红楼梦"], "zh", 1.0),
        ("红 楼 梦", ["红楼梦"], "zh", 1.0),
        ("红楼", ["红楼梦"], "zh", 0.0),
        ("", ["the"], "en", 0.0),
        ("", ["+"], "en", 0.0),
        ("+", ["+"], "en", 1.0),
    ],
)
def test_exact_match(answer: str, accepted: list[str], language: str, expected: float) -> None:
    assert exact_match(answer, accepted, language) == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("There are 3 and 4, so 12.", "en", "12"),
        ("It costs $1,234.50.", "en", "1234.5"),
        ("1,234,567 people", "en", "1234567"),
        ("12,34", "en", "34"),  # no thousands: two numbers
        ("1,2345", "en", "2345"),
        ("1.500", "en", "1.5"),
        ("1.500", "vi", "1500"),
        ("1.500.000 đồng", "vi", "1500000"),
        ("1.234,5", "vi", "1234.5"),
        ("3,5 kg", "vi", "3.5"),
        ("0.125", "vi", "0.125"),
        ("1,234 đồng", "vi", "1234"),
        ("1,234.5", "vi", "1234.5"),
        ("1\u202f234\u00a0567", "fr", "1234567"),
        ("5 100", "fr", "100"),
        ("1,00,000", "hi", "100000"),
        ("答案是１，２３４", "zh", "1234"),
        ("一共12个，买了3个", "zh", "3"),
        ("१२३", "hi", "123"),
        ("١٬٢٣٤٫٥", "ar", "1234.5"),
        ("x = -7", "en", "-7"),
        ("x = −7", "en", "-7"),
        ("10-7", "en", "7"),
        ("-1.234,5", "de", "-1234.5"),
        ("-1,234", "en", "-1234"),
        ("5 m²", "en", "5"),
        ("007", "en", "7"),
        ("no number", "en", None),
        ("", "en", None),
    ],
)
def test_last_number(text: str, language: str, expected: str | None) -> None:
    assert last_number(text, language) == (None if expected is None else Decimal(expected))
