import os
import subprocess
import sys

import pytest

from ll3m.core import stderr


def test_start_up_messages_are_dropped_and_the_rest_printed_in_order(capfd):
  with stderr.tensorflow_import():
    os.write(2, b"first\n2026-01-01 E port.cc:153] oneDNN custom operations are on\nsecond\n")
    os.write(2, b"third\n")
  os.write(2, b"port.cc: after\n")
  assert capfd.readouterr().err == "first\nsecond\nthird\nport.cc: after\n"


def test_output_is_printed_after_an_error(capfd):
  with pytest.raises(ImportError), stderr.tensorflow_import():
    os.write(2, b"no such library\n")
    raise ImportError
  assert capfd.readouterr().err == "no such library\n"


@pytest.mark.parametrize("held_back", [False, True])
def test_final_message_is_printed_from_any_thread(held_back):
  script = f"""
import contextlib, threading
from ll3m.core import stderr
with stderr.tensorflow_import() if {held_back} else contextlib.nullcontext():
  threading.Thread(target=stderr.leave, args=("error: é", 7)).start()
  threading.Event().wait()
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (7, "error: é\n")
