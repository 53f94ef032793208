"""A build's progress as it is drawn."""

import io

from spark_me.engine.build import Progress, Step, parse_step


def test_steps_are_read_from_ninja():
    line = "[3/13] c++ -MMD -MF /b/x.o.d -I/s -c -c /tmp/me/src/convolution_cpu.cpp -o /b/src/convolution_cpu.o -O3"
    assert parse_step(line) == Step(3, 13, "convolution_cpu.cpp")
    assert parse_step("  [10/20] nvcc -c src/gpu.cu -o gpu.o") == Step(10, 20, "gpu.cu")
    assert parse_step("copying [1/2] file") is None
    assert parse_step("error: [x/y]") is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere():
    for stream in (Terminal(), io.StringIO()):
        seconds = iter(range(0, 1000, 65))
        progress = Progress("building", stream, clock=lambda times=seconds: next(times))
        for line in ("[1/2] c++ a.cpp", "noise", "[2/2] c++ b.cpp"):
            progress.read(line)
            progress.tick()
        progress.close()
        text = stream.getvalue()
        if stream.isatty():
            assert text.count("\n") == 1
            assert text.endswith("\n")
            assert "2/2 files" in text.split("\r")[-1]
            assert "1:05" in text.split("\r")[1]
        else:
            assert text == "building: 1/2  1:05  a.cpp\nbuilding: 2/2  2:10  b.cpp\n"
