"""The package as a user meets it: each public name resolves and is documented, help costs no torch."""

import inspect
import subprocess
import sys

import reasonrl


def test_the_command_line_helps_without_torch():
    code = (
        "import sys\nfrom reasonrl.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True)


def test_every_public_name_resolves_and_is_documented():
    for name in reasonrl.__all__:
        found = getattr(reasonrl, name)
        assert name in dir(reasonrl)
        if inspect.isclass(found) or inspect.isroutine(found):
            assert inspect.getdoc(found), name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(reasonrl, "Recipee")
