"""The page of models and features is what the tests say."""

from tests import support_table


def test_the_page_is_current():
    assert support_table.PAGE.read_text() == support_table.page(), "run: python -m tests.support_table"


def test_marks_are_found(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.mark.serves('a', 'b')\ndef test_x(): pass\n"
        "@pytest.mark.gpu\n@pytest.mark.refuses('c')\ndef test_y(): pass\n"
        "def test_z(): pass\n"
    )
    (tmp_path / "test_two.py").write_text(
        "import pytest\npytestmark = [pytest.mark.gpu, pytest.mark.engine]\n"
        "@pytest.mark.serves('a')\ndef test_x(): pass\n"
    )
    found = [(c.feature, c.test.split("::")[1], c.gpu, c.refused) for c in support_table.claims(tmp_path)]
    assert found == [
        ("a", "test_x", False, False),
        ("b", "test_x", False, False),
        ("c", "test_y", True, True),
        ("a", "test_x", True, False),
    ]
