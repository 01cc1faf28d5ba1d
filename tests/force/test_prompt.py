"""Force prompts from the command line, JSON and csv, and what is refused, in one line."""

from __future__ import annotations

import json

import pytest

from phantom.errors import UserError
from phantom.force.files import parse_forces, read_forces
from phantom.force.prompt import ForcePrompt, PointForce, Wind

PUSH = PointForce(0.3, 0.6, 45, 0.8)


def test_the_command_line_states_points_and_a_wind():
    assert parse_forces(["0.3,0.6,45,0.8"]) == [ForcePrompt((PUSH,))]
    (both,) = parse_forces(["0.3, 0.6, 45, 0.8", "1,0,-90,1,2.5"], "180,0.5")
    assert both == ForcePrompt((PUSH, PointForce(1, 0, -90, 1, 2.5)), Wind(180, 0.5))
    assert parse_forces([], "180,0.5") == [ForcePrompt(wind=Wind(180, 0.5))]


def test_a_prompt_survives_json(tmp_path):
    prompt = ForcePrompt((PUSH, PointForce(0, 1, 0, 0, 1.5)), Wind(10, 1))
    assert ForcePrompt.from_json(prompt.to_json()) == prompt
    path = tmp_path / "forces.json"
    path.write_text(prompt.to_json())
    assert parse_forces([str(path)]) == [prompt]
    path.write_text(json.dumps([{"wind": {"angle": 0, "magnitude": 1}}, {"points": [{**vars(PUSH)}]}]))
    assert read_forces(path) == [ForcePrompt(wind=Wind(0, 1)), ForcePrompt((PUSH,))]


def test_a_csv_of_points_is_one_prompt(tmp_path):
    path = tmp_path / "points.CSV"
    path.write_text("x,y,angle,magnitude,time\n.3,.6,45,.8,\n.1,.2,0,1,2\n")
    assert read_forces(path) == [ForcePrompt((PUSH, PointForce(0.1, 0.2, 0, 1, 2)))]


def test_the_columns_of_force_prompting_are_read_as_they_are(tmp_path):
    path = tmp_path / "point.csv"
    columns = "image,angle,force,coordx,coordy,width,height,caption\n"
    path.write_text(columns + 'apple.png,45,0.8,216,192,720,480,"An apple, green"\nb.png,0,0.5,0,480,720,480,b\n')
    assert read_forces(path) == [ForcePrompt((PUSH,)), ForcePrompt((PointForce(0, 0, 0, 0.5),))]
    path.write_text(columns + "a.mp4,45,16,216,192,720,480,a\nb.mp4,90,64,720,0,720,480,b\n")
    assert [prompt.points[0].magnitude for prompt in read_forces(path)] == [0.25, 1]  # of the strongest
    path.write_text("video,caption,frame,fps,seconds,wind_speed,wind_angle\na.mp4,a,49,8,6,0.3,270\n")
    assert read_forces(path) == [ForcePrompt(wind=Wind(270, 0.3))]


@pytest.mark.parametrize(
    ("forces", "wind", "message"),
    [
        (["1.2,0.6,45,0.8"], None, "force: x: found 1.2; accepted: from 0 to 1, inside the picture"),
        (["0.2,-.1,45,0.8"], None, "force: y: found -0.1; accepted: from 0 to 1, inside the picture"),
        (["0.2,nan,45,0.8"], None, "force: y: found nan; accepted"),
        (["0.2,0.1,4500,0.8"], None, "force: angle: found 4500; accepted: degrees from -360 to 360"),
        (["0.2,0.1,45,8"], None, "force: magnitude: found 8; accepted: from 0 to 1"),
        (["0.2,0.1,45,1,-1"], None, "force: time: found -1; accepted: 0 s or more"),
        (["0.2,0.1,45"], None, "found '0.2,0.1,45'; accepted: X,Y,ANGLE,MAGNITUDE or X,Y,ANGLE,MAGNITUDE,TIME, num"),
        (["left"], None, "force: found 'left'; accepted: X,Y,ANGLE"),
        ([], "180", "wind: found '180'; accepted: ANGLE,MAGNITUDE, numbers"),
        ([], None, "force: found an empty prompt"),
        (["nowhere.json"], None, "force: nowhere.json: cannot be read: No such file"),
        (["nowhere.json"], "0,1", "force: found nowhere.json and other forces; accepted: one file, or points"),
    ],
)
def test_a_wrong_force_is_refused_in_one_line(forces, wind, message):
    with pytest.raises(UserError) as error:
        parse_forces(forces, wind)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "force: not JSON: "),
        ("a.json", "[]", "no force in it"),
        ("a.json", "[3]", "found 3; accepted: an object with points, a list, or wind, or both"),
        ("a.json", '{"points": {}, "gusts": 1}', "accepted: an object with points"),
        ("a.json", '{"points": [{"x": 0.5}]}', "found {'x': 0.5}; accepted: an object of x, y, angle, magnitude, time"),
        ("a.json", '{"wind": {"angle": true, "magnitude": 1}}', "angle: found True; accepted: degrees"),
        ("a.json", '{"wind": {}}', "found {}; accepted: an object of angle, magnitude"),
        ("a.json", "[" * 100_000, "force: not JSON: "),
        (
            "a.json",
            f'{{"points": [{{"x": 0, "y": 0, "angle": 0, "magnitude": 1, "time": 1{"0" * 400}}}]}}',
            "force: time:",
        ),
        ("a.csv", "x,y\n1,1\n", "found columns x, y; accepted: those of one of x, y, angle, magnitude; force, angle"),
        ("a.csv", "", "found columns none"),
        ("a.csv", "x,y,angle,magnitude\n", "no force in it"),
        ("a.csv", "x,y,angle,magnitude\n0,0,0,1\n0,up,0,1\n", "line 3: force: y: found 'up'; accepted: a number"),
        ("a.csv", "x,y,angle,magnitude\n0,0\n", "line 2: force: angle: found None; accepted: a number"),
        ("a.csv", "wind_speed,wind_angle\n0.5,999\n", "line 2: force: angle: found 999"),
        ("a.csv", "force,angle,coordx,coordy,width,height\n1,0,5,9,8,8\n", "line 2: force: y: found -0.125"),
        ("a.csv", "force,angle,coordx,coordy,width,height\n1,0,5,9,0,8\n", "line 2: force: found a picture of 0 x 8"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_forces(tmp_path / name)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / name}: ") and message in said and "\n" not in said


def test_a_push_after_the_end_is_refused():
    late = ForcePrompt((PointForce(0, 0, 0, 1, 3.0),))
    late.check_duration(3.5)
    with pytest.raises(UserError, match=r"^force: time: found 3; accepted: before 3 s, the video's end$"):
        late.check_duration(3.0)
