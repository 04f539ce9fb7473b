"""The lists of videos as people have them, read as they lie on disk, and two folders of files as pairs."""

from __future__ import annotations

import csv
import json
import os
import random
import string
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

import prepare_data
from clap2diffusion.base.exits import UserError
from clap2diffusion.dataset.manifest import read_manifest
from clap2diffusion.videos.file_names import list_videos, read_name
from clap2diffusion.videos.list_rows import KINDS, recognise
from clap2diffusion.videos.lists import read_list
from clap2diffusion.videos.pairs import match_names
from clap2diffusion.videos.wanted import Wanted, read_video_id, window_start

NFC, NFD = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))

# name of the list, its text, the files of the folder, what is read: (id, file, start_s, label, texts, split)
# of the rows that have a file; (row, reason) of the others. Ids, labels and captions are made up.
VGGSOUND = ("vggsound.csv", '''# YouTube ID, start seconds, label, train/test split.
---g-f_I2yQ,1,people marching,test
--0PQM4-hqg,30,"waterfall burbling, loud",train
-_id_000030,30,dog barking,train
a_b-c_d-e_f,7,bird chirping, tweeting,train
AbCdEfGhIjK,0,cat purring,train
AbCdEfGhIjK,50,cat purring,train
lostlostlos,5,dog barking,train
badsplit_-1,5,dog barking,tset
''', ["deep/er/---g-f_I2yQ_1000_11000.MP4", "--0PQM4-hqg_000030.mp4", "-_id_000030.mkv",
      "a_b-c_d-e_f_7_17.webm", "AbCdEfGhIjK_000000.mp4", "AbCdEfGhIjK_000050.mp4",
      "badsplit_-1_000005.mp4"], [
    ("---g-f_I2yQ", "deep/er/---g-f_I2yQ_1000_11000.MP4", 0, "people marching", None, "test"),
    ("--0PQM4-hqg", "--0PQM4-hqg_000030.mp4", 0, "waterfall burbling, loud", None, "train"),
    ("-_id_000030", "-_id_000030.mkv", 30, "dog barking", None, "train"),  # that is the id, and no time
    ("a_b-c_d-e_f", "a_b-c_d-e_f_7_17.webm", 0, "bird chirping, tweeting", None, "train"),
    ("AbCdEfGhIjK", "AbCdEfGhIjK_000000.mp4", 0, "cat purring", None, "train"),
    ("AbCdEfGhIjK", "AbCdEfGhIjK_000050.mp4", 0, "cat purring", None, "train")],
    [("vggsound.csv line 8", "missing from the folder", ""),
     ("vggsound.csv line 9", "a row that cannot be read",
      "a split 'tset' that is none of train, val, test")])
VGGSOUND_TEST = ("test.csv", 'abcdefghi-K_000300.mp4,playing hammond organ\n'
                 '0_8-g2rof7E_000049.mp4,"heart sounds, heartbeat"\n'
                 'abcdefghi-K_000310.mp4,playing hammond organ\n',
                 ["abcdefghi-K_000300.mp4", "0_8-g2rof7E_49.mp4"], [
    ("abcdefghi-K", "abcdefghi-K_000300.mp4", 0, "playing hammond organ", None, "test"),
    ("0_8-g2rof7E", "0_8-g2rof7E_49.mp4", 0, "heart sounds, heartbeat", None, "test")],
    [("test.csv line 3", "missing from the folder", "abcdefghi-K_000300.mp4 begins at another second")])
AUDIOCAPS = ("val.csv", '''audiocap_id,youtube_id,start_time,caption
97151,vfY_TJq7n_U,130,"Rustling occurs, ducks quack"
97152,vfY_TJq7n_U,130,Ducks quack
97153,tdWhHV3X25Q,60,An audience gives applause
97154,vfY_TJq7n_U,130,Water splashes
97155,vfY_TJq7n_U,130,Ducks quack
97156,-_wholevid0,4,"A ""loud"" horn"
''', ["vfY_TJq7n_U_130.mp4", "YtdWhHV3X25Q.mp4", "My film [-_wholevid0].webm"], [
    ("vfY_TJq7n_U", "vfY_TJq7n_U_130.mp4", 0, None,
     ("Rustling occurs, ducks quack", "Ducks quack", "Water splashes"), "val"),
    ("tdWhHV3X25Q", "YtdWhHV3X25Q.mp4", 60, None, ("An audience gives applause",), "val"),
    ("-_wholevid0", "My film [-_wholevid0].webm", 4, None, ('A "loud" horn',), "val")],
    [("val.csv line 6", "listed twice", "as val.csv line 2")])
AUDIOSET = ("balanced_train_segments.csv", '''# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=2, num_segs=2, num_unique_labels=3, num_positive_labels=3
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.0, 40.000, "/m/09x0r,/t/dd00088"
-0RWZT-miFs, 420.500, 430.500, "/m/03v3yw"
''', ["--PJHxphWEs_30.000_40.000.mp4", "-0RWZT-miFs_420500_430500.mp4"], [
    ("--PJHxphWEs", "--PJHxphWEs_30.000_40.000.mp4", 0, "Speech+Gush", ("Speech, Gush",), "train"),
    ("-0RWZT-miFs", "-0RWZT-miFs_420500_430500.mp4", 0, "Keys jangling", None, "train")], [])
LLP = ("AVVP_test_pd.csv", "filename\tevent_labels\nBjCEufrlXm4_20_30\tSpeech,Dog\n"
       "7nSYwyaP4QE_350_360\tFrying_(food)\nP7x4FV4lg_570_580\tSpeech\n",
       ["video/BjCEufrlXm4.mp4", "audio/BjCEufrlXm4.wav", "7nSYwyaP4QE_350_360.mp4"], [
    ("BjCEufrlXm4", "video/BjCEufrlXm4.mp4", 20, "Speech+Dog", ("Speech, Dog",), "test"),
    ("7nSYwyaP4QE", "7nSYwyaP4QE_350_360.mp4", 0, "Frying_(food)", ("Frying (food)",), "test")],
    [("AVVP_test_pd.csv line 4", "a row that cannot be read", "not an id of 11 characters with two seconds")])
PLAIN = ("my list.csv", f"file;start_s;label;text;split;properties\ndog 1.mp4;2.5;dog;A dog;;\n"
         f"sub/{NFD}.mp4;;cat;;Validation;\n-dash;;dog;;;\ntwo;;dog;;;\ngone.mp4;;dog;;;\n;;dog;;;\n"
         "dog 1.mp4;soon;dog;;;\n-dash;9;dog;;;{bad\n",
         ["DOG 1.mp4", "dog 1.mp4", f"sub/{NFC}.MP4", "in/-dash.mov", "a/two.mp4", "b/two.mp4"], [
    ("dog 1", "dog 1.mp4", 2.5, "dog", ("A dog",), None),
    (f"sub/{NFC}", f"sub/{NFC}.MP4", None, "cat", ("cat",), "val"),
    ("in/-dash", "in/-dash.mov", None, "dog", ("dog",), None)],
    [("my list.csv line 5", "several files of that name", ""),
     ("my list.csv line 6", "missing from the folder", ""),
     ("my list.csv line 7", "a row that cannot be read", "names no file"),
     ("my list.csv line 8", "a row that cannot be read", "a time that is not a number of seconds"),
     ("my list.csv line 9", "a row that cannot be read", "properties that are no JSON object")])
LISTS = {"vggsound": VGGSOUND, "vggsound-test": VGGSOUND_TEST, "audiocaps": AUDIOCAPS, "audioset": AUDIOSET,
         "llp": LLP, "plain": PLAIN}
ONTOLOGY = [{"id": "/m/09x0r", "name": "Speech"}, {"id": "/t/dd00088", "name": "Gush"},
            {"id": "/m/03v3yw", "name": "Keys jangling"}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def told(clip: Wanted) -> tuple:
    return clip.video_id, clip.file, clip.start_s, clip.label, clip.texts, clip.split


def asked(kind: str) -> tuple[list, list]:
    _, _, _, found, missing = LISTS[kind]
    return [(*row[:4], row[4] or (row[3],), row[5]) for row in found], missing


@pytest.mark.parametrize("given", ["with --list", "recognised"])
@pytest.mark.parametrize("kind", LISTS)
def test_each_list_is_read_as_it_lies_on_disk(tmp_path, kind, given):
    name, text, files, _, _ = LISTS[kind]
    ontology = write(tmp_path, "ontology.json", json.dumps(ONTOLOGY)) if kind == "audioset" else None
    said = []
    clips = read_list(write(tmp_path, name, text), kind if given == "with --list" else None, files, ontology,
                      log=said.append)
    found, missing = asked(kind)
    assert [told(clip) for clip in clips if not clip.reason] == found
    assert [(clip.where, clip.reason, clip.detail) for clip in clips if clip.reason] == missing
    assert not said
    assert all(clip.length_s == (None if kind == "plain" else 10) for clip in clips if not clip.reason)


@pytest.mark.parametrize("way", ["BOM, CRLF and blank lines", "a header", "no last newline"])
@pytest.mark.parametrize("kind", ["vggsound", "vggsound-test", "audioset", "llp"])
def test_marks_line_ends_and_a_header_of_ones_own_change_nothing(tmp_path, kind, way):
    name, text, files, _, _ = LISTS[kind]
    header = {"vggsound": "youtube_id,start_seconds,label,split\n", "vggsound-test": "name,what\n", "llp": "",
              "audioset": "YTID, start_seconds, end_seconds, positive_labels\n"}[kind]
    plain = [line for line in text.splitlines() if not line.startswith("#")]
    text = {"a header": header + "\n".join(plain) + "\n", "no last newline": text.rstrip("\n")}.get(
        way, "\ufeff" + text.replace("\n", "\r\n\r\n"))
    ontology = write(tmp_path, "o.csv", "index,mid,display_name\n" + "".join(
        f'{i},{one["id"]},"{one["name"]}"\n' for i, one in enumerate(ONTOLOGY)))
    clips = read_list(write(tmp_path, name, text), None, files, ontology, log=lambda _: None)
    found, missing = asked(kind)
    assert [told(clip) for clip in clips if not clip.reason] == found
    assert [clip.reason for clip in clips if clip.reason] == [reason for _, reason, _ in missing]


@pytest.mark.parametrize("flag", LISTS)
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_another_kind_than_the_flag_says_is_named(tmp_path, kind, flag):
    name, text, files, _, _ = LISTS[kind]
    path = write(tmp_path, name, text)
    assert recognise(path) == kind
    if kind != flag:
        with pytest.raises(UserError) as error:
            read_list(path, flag, files)
        said = str(error.value)
        assert said.startswith(f"{path}: is a list of kind {kind} ") and f"give --list {kind}," in said
        assert f"not {flag} as --list says" in said


NO_LISTS = {  # what it is: its content, a part of the sentence
    "another table": ("name,age\nAnn,3\n", "its first line is 'name,age', which is none of the lists"),
    "one word": ("hello\n", "its first line is 'hello'"),
    "empty": ("", "is empty, expected a list of clips"),
    "comments alone": ("# a\n# b\n\n", "is empty, expected a list of clips"),
    "a header alone": ("audiocap_id,youtube_id,start_time,caption\n", "has a header and no row"),
    "LLP's events": ("filename\tonset\toffset\tevent_labels\n4YdbENYcIyE_23_33\t0\t4\tDog\n",
                     "give AVVP_train.csv"),
    "AudioSet's classes": ('index,mid,display_name\n0,/m/09x0r,"Speech"\n', "give it with --ontology"),
    "AudioSet's strong labels": ("segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
                                 "b0RFKhbpFJA_30000\t0\t1\t/m/x\n", "is AudioSet's strong labels"),
    "VGGSound's numbers": ('"female speech, woman speaking",1050\npiano,9\n', "which is none of the lists"),
    "a manifest": ("image_file_name,audio_file_name,text\na.png,a.wav,x\n", "is a manifest of sounds"),
    "own videos without a header": ("dog 1.mp4,dog\ndog 2.mp4,dog\n", "plain (a header of your own: file"),
    "a web page": ("<!DOCTYPE html><html>", "is a web page or XML"),
    "UTF-16": ("file,label\na.mp4,b\n".encode("utf-16"), "is text in UTF-16 or UTF-32"),
    "Latin-1": ("file,label\na.mp4,caf\xe9\n".encode("latin-1"), "is not UTF-8 text (byte 0xe9)"),
    "an open quote": ('file,label\na.mp4,"dog\nb.mp4,cat\n', "line 2 or after it: not valid CSV"),
    "a column twice": ("file,label,label\na.mp4,dog,cat\n", "the column 'label' stands twice in the header"),
    "an Excel table": (b"PK\x03\x04xx", "is a ZIP archive or an Excel table")}


@pytest.mark.parametrize("what", NO_LISTS)
def test_what_is_no_list_gets_one_sentence(tmp_path, what):
    content, says = NO_LISTS[what]
    path = write(tmp_path, "list.csv", content)
    with pytest.raises(UserError) as error:
        read_list(path, None, ["a.mp4"])
    said = str(error.value)
    assert says in said and said.startswith(f"{path}: ") and "\n" not in said


def test_lists_and_kinds_that_do_not_go_together(tmp_path):
    path, other = write(tmp_path, *VGGSOUND[:2]), write(tmp_path, *AUDIOCAPS[:2])
    for lists, kind, says in ((None, "vggsound", "--list vggsound needs the list itself"),
                              (path, "folders", "--list folders reads no list"),
                              ([path, other], None, "is a list of kind audiocaps"),
                              (tmp_path, None, "is not a file"), (tmp_path / "no.csv", None, "no such file")):
        with pytest.raises(UserError, match=says):
            read_list(lists, kind, ["a.mp4"])
    with pytest.raises(UserError) as error:
        read_list(path, None, ["other.mp4"])
    assert ("none of its 8 clips is among the 1 files; the first is ---g-f_I2yQ from 1 s, read from "
            "---g-f_I2yQ_000001.mp4, ---g-f_I2yQ_1000_11000.mp4 or ---g-f_I2yQ.mp4, the first file is "
            "'other.mp4'") in str(error.value)
    said = []
    read_list(path, None, VGGSOUND[2], tmp_path / "o.json", log=said.append)
    assert said == [f"--ontology {tmp_path}/o.json: not used, it names the classes of AudioSet's lists alone"]
    with pytest.raises(UserError, match="ontology"):
        read_list(write(tmp_path, *AUDIOSET[:2]), None, AUDIOSET[2], write(tmp_path, "o.json", "{}"))


def test_several_lists_of_one_kind_give_their_splits_by_name(tmp_path):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    lists = [write(tmp_path, f"{name}.csv", f"{head}1,{id_},0,A {name}\n")
             for name, id_ in (("train", "aaaaaaaaaaa"), ("val", "bbbbbbbbbbb"), ("test", "ccccccccccc"))]
    clips = read_list(lists, None, [f"{letter * 11}.mp4" for letter in "abc"])
    assert [clip.split for clip in clips] == ["train", "val", "test"]
    evals = write(tmp_path, "eval_segments.csv", 'aaaaaaaaaaa, 0.0, 10.0, "/m/a"\n')
    said = []
    assert read_list(evals, None, ["aaaaaaaaaaa.mp4"], log=said.append)[0].split == "test"
    assert said == ["1 classes have a code and no name (/m/a): give --ontology ontology.json"]


def test_a_clip_listed_twice_comes_back_with_its_reason(tmp_path):
    path = write(tmp_path, "v.csv", "aaaaaaaaaaa,1,dog,train\naaaaaaaaaaa,1,dog,train\n"
                 "aaaaaaaaaaa,1,cat,train\naaaaaaaaaaa,9,dog,train\n")
    clips = read_list(path, None, ["aaaaaaaaaaa_000001.mp4", "aaaaaaaaaaa_000009.mp4"])
    assert [(clip.reason, clip.detail) for clip in clips] == [
        ("", ""), ("listed twice", "as v.csv line 1"),
        ("listed twice", "as v.csv line 1, with another label or split"), ("", "")]


def test_of_several_files_of_a_clip_the_exact_one_wins_and_it_is_said(tmp_path):
    path = write(tmp_path, "v.csv", "aaaaaaaaaaa,30,dog,train\n")
    order = ["aaaaaaaaaaa_30000_40000.mp4", "x/aaaaaaaaaaa_000030.mp4", "aaaaaaaaaaa.mp4",
             "aaaaaaaaaaa_000030.wav", "aaaaaaaaaaa.wav"]
    for i, best in enumerate(order):
        said = []
        [clip] = read_list(path, None, [*reversed(order[i:]), "aaaaaaaaaaa_000031.mp4"], log=said.append)
        assert clip.file == best and clip.whole == (best in ("aaaaaaaaaaa.mp4", "aaaaaaaaaaa.wav"))
        assert [order.index(name) for line in said for name in order if name in line] == (
            [] if i in (2, 4) else [i, i + 1])  # a sound beside a video is no second choice


@pytest.mark.parametrize("name, clip", [
    ("AbCdEfGhIjK_000030.mp4", ("AbCdEfGhIjK", 30)), ("a/AbCdEfGhIjK_30.MP4", ("AbCdEfGhIjK", 30)),
    ("AbCdEfGhIjK_30000_40000.mp4", ("AbCdEfGhIjK", 30)), ("AbCdEfGhIjK_30_40.mp4", ("AbCdEfGhIjK", 30)),
    ("AbCdEfGhIjK_30.5-40.5.wav", ("AbCdEfGhIjK", 30.5)), ("AbCdEfGhIjK.mp4", ("AbCdEfGhIjK", None)),
    ("YAbCdEfGhIjK.wav", ("AbCdEfGhIjK", None)), ("-_bCdE_0000_000000.mp4", ("-_bCdE_0000", 0)),
    ("A_1_2_3_4_5.mp4", ("A_1_2_3_4_5", None)), ("Film: a [AbCdEfGhIjK].webm", ("AbCdEfGhIjK", None)),
    ("dog.mp4", None), ("AbCdEfGhIjK_000030_x.mp4", None), ("AbCdEfGhIj.mp4", None)])
def test_the_name_of_a_file_tells_the_clip(name, clip):
    assert read_name(name) == clip


@pytest.mark.parametrize("start, duration, begins", [(30, 120, 30), (30, 10.02, 0), (30, 40, 30), (0, 10, 0),
                                                     (3, 10.0, 0), (30, 25, 30), (5, 15, 5)])
def test_a_file_with_the_id_alone_is_the_whole_video_or_the_clip_by_its_length(start, duration, begins):
    clip = Wanted("a" * 11, "aaaaaaaaaaa.mp4", start, 10, None, (), None, "", whole=True)
    assert window_start(clip, duration) == begins


def test_a_tree_gives_its_folders_as_labels_and_splits():
    files = ["train/explosion/a.mp4", "test/explosion/b.mp4", "rain/sub_class/c.mp4", "val/d.mp4", "e.mp4",
             f"{NFD}/AbCdEfGhIjK_000010.mp4", f"{NFD}/AbCdEfGhIjK_000020.mp4"]
    clips = read_list(None, None, files)
    assert [(clip.label, clip.texts, clip.split) for clip in clips] == [
        ("explosion", ("explosion",), "train"), ("explosion", ("explosion",), "test"),
        ("sub_class", ("sub class",), None), (None, (), "val"), (None, (), None),
        (NFC, (NFC,), None), (NFC, (NFC,), None)]
    assert all(clip.start_s is None and clip.length_s is None for clip in clips)
    assert clips[-1].video_id == clips[-2].video_id == "AbCdEfGhIjK"
    assert len({clip.video_id for clip in clips}) == 6
    # what only looks like an id of 11 characters is none: these are videos of their own
    assert len({read_video_id(f"my-dogs-abc_{i:06d}.mp4") for i in range(4)}) == 4


ODD = {  # what is odd: name and text of the list, (id, start_s, label, texts, split) of its first row
    "semicolons": (("v.csv", "aaaaaaaaaaa;30;dog;train\n"), ("aaaaaaaaaaa", 30, "dog", ("dog",), "train")),
    "a comment with another separator": (("v.csv", "# a\tb;c\naaaaaaaaaaa,30,dog,train\n"),
                                         ("aaaaaaaaaaa", 30, "dog", ("dog",), "train")),
    "CR alone": (("v.csv", "aaaaaaaaaaa,30,dog,train\rbbbbbbbbbbb,30,dog,test\r"),
                 ("aaaaaaaaaaa", 30, "dog", ("dog",), "train")),
    "pandas' index": (("v.csv", ",video_id,start_seconds,label,split\n0,aaaaaaaaaaa,30,dog,train\n"),
                      ("aaaaaaaaaaa", 30, "dog", ("dog",), "train")),
    "no split": (("v.csv", "aaaaaaaaaaa,30.0,dog\n"), ("aaaaaaaaaaa", 30, "dog", ("dog",), None)),
    "a length of AudioCaps": (("a.csv", "audiocap_id,youtube_id,start_time,audio_length,caption\n"
                               "1,aaaaaaaaaaa,30,10,A dog\n"), ("aaaaaaaaaaa", 30, None, ("A dog",), None)),
    "no quotes in AudioSet": (("eval_segments.csv", "aaaaaaaaaaa, 3.0, 13.0, Speech,Rock+roll\n"),
                              ("aaaaaaaaaaa", 3, "Speech+Rock and roll", ("Speech, Rock and roll",), "test")),
    "commas in LLP": (("l.csv", 'filename,event_labels\naaaaaaaaaaa_20_30,"Speech,Dog"\n'),
                      ("aaaaaaaaaaa", 20, "Speech+Dog", ("Speech, Dog",), None)),
    "Excel's first line": (("o.csv", "sep=;\nFile;Label\nAAAAAAAAAAA.MP4;dog\n"),
                           ("aaaaaaaaaaa", None, "dog", ("dog",), None)),
    "ids without a time": (("o.csv", "video_id,label\naaaaaaaaaaa,dog\n"),
                           ("aaaaaaaaaaa", None, "dog", ("dog",), None)),
    "Windows' paths": (("o.csv", "file,label\nC:\\v\\aaaaaaaaaaa.mp4,dog\n"),
                       ("aaaaaaaaaaa", None, "dog", ("dog",), None))}


@pytest.mark.parametrize("what", ODD)
def test_odd_lists_are_read_as_they_are_meant(tmp_path, what):
    listed, expected = ODD[what]
    first = read_list(write(tmp_path, *listed), None, ["aaaaaaaaaaa.mp4"], log=print)[0]
    assert told(first) == (expected[0], "aaaaaaaaaaa.mp4", *expected[1:])


def test_the_greatest_hits_gives_a_window_for_each_run_of_hits(tmp_path):
    write(tmp_path, "a/2015-01-01_times.txt", "1.5 wood hit static\n2.0 wood scratch deform\n"
          "4.0 None hit static\n5.0 metal None None\n6.0 metal hit static\r\n6.2 wood hit static\n"
          "30 wood hit static\nnonsense\n")
    write(tmp_path, "2015-02-02_times.txt", "1.0 None None None\n")
    files = ["a/2015-01-01_denoised.mp4", "a/2015-01-01_denoised_thumb.mp4", "a/2015-01-01_mic.mp4",
             "a/2015-01-01_denoised.wav", "2015-02-02_denoised.mp4", "2015-03-03_denoised_thumb.mp4"]
    for kind in (None, "greatest-hits"):
        clips = read_list(None, kind, files, root=tmp_path)
        assert [(c.file, c.start_s, c.length_s, c.label) for c in clips if not c.reason] == [
            ("a/2015-01-01_denoised.mp4", 1.0, 5.0, "wood"), ("a/2015-01-01_denoised.mp4", 6.0, 1.0, "metal"),
            ("a/2015-01-01_denoised.mp4", 29.5, 10.0, "wood")]
        assert sorted(c.reason for c in clips if c.reason) == ["no hit with a material", "no times file"]
    assert len({clip.video_id for clip in clips}) == 3
    clips = read_list(None, None, files, root=tmp_path, window_s=4)
    assert [clip.length_s for clip in clips if not clip.reason] == [4, 1, 4]


def test_a_folder_is_listed_without_sidecars_and_other_files(tmp_path):
    for name in ("a.mp4", "B/c.MP4", "B/._c.MP4", ".DS_Store", "Thumbs.db", "__MACOSX/a.mp4", "notes.txt",
                 "lost+found/a.mp4", "list.csv", "t/-x.webm", "still.jpg", "sound.wav", "no suffix"):
        write(tmp_path, name, "x")
    (tmp_path / "t/loop").symlink_to(tmp_path)
    assert list_videos(tmp_path) == ["B/c.MP4", "a.mp4", "no suffix", "sound.wav", "t/-x.webm"]
    with pytest.raises(UserError, match="no such folder"):
        list_videos(tmp_path / "a.mp4")


def test_a_list_of_vggsounds_size_takes_seconds(tmp_path):
    letters, draw = string.ascii_letters + string.digits + "-_", random.Random(0)
    ids = ["".join(draw.choices(letters, k=11)) for _ in range(20_000)]  # a tenth of it
    path = write(tmp_path, "v.csv", "".join(f'{id_},{i % 600},"a, b",train\n' for i, id_ in enumerate(ids)))
    files = [f"{id_}_{i % 600:06d}.mp4" for i, id_ in enumerate(ids)]
    began = time.process_time()
    clips = read_list(path, None, files)
    assert sum(clip.file is not None for clip in clips) == 20_000
    assert time.process_time() - began < 4  # it takes 0.4 s; a search through all files would take minutes


# ---- two folders

def test_names_match_by_folder_first_then_by_base_name():
    sounds = ["dog/001.wav", "cat/001.wav", "two.wav", "two.flac", f"{NFC}.wav", "lonely.wav", "UP.WAV",
              "sub/deep.wav", "Case.wav", "case.wav", "x/many.wav", "y/many.wav"]
    pictures = ["dog/001.png", "Cat/001.png", "two.png", f"{NFD}.png", "alone.png", "up.png",
                "other/deep.png", "case.png", "many.png"]
    pairs, skipped = match_names(sounds, pictures)
    assert pairs == sorted([
        ("dog/001.wav", "dog/001.png"), ("cat/001.wav", "Cat/001.png"), ("two.flac", "two.png"),
        (f"{NFC}.wav", f"{NFD}.png"), ("UP.WAV", "up.png"), ("sub/deep.wav", "other/deep.png"),
        ("case.wav", "case.png")])
    assert {one.file: one.reason for one in skipped} == {
        "two.wav": "another file of that name is used", "lonely.wav": "no picture of that name",
        "alone.png": "no sound of that name", "Case.wav": "no picture of that name",
        **dict.fromkeys(("x/many.wav", "y/many.wav", "many.png"),
                        "several files of that name in several folders")}


@pytest.fixture
def two_folders(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    for name in ("train/dog/1", "train/dog/2", "val/cat/1", "val/cat/2", "-x"):
        sound, picture = tmp_path / f"sounds/{name}.wav", tmp_path / f"pictures/{name}.png"
        sound.parent.mkdir(parents=True, exist_ok=True)
        picture.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(sound, draw.normal(0, 0.1, 16_000), 16_000)
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(picture)
    write(tmp_path, "sounds/._-x.wav", "x")
    return tmp_path


def make(folder: Path, *args: str, sounds="sounds", pictures="pictures", out="out") -> None:
    prepare_data.main(["pairs", "--audio", str(folder / sounds), "--images", str(folder / pictures), "--out",
                       str(folder / out), *args])


def test_two_folders_become_a_data_folder(two_folders, capsys):
    write(two_folders, "sounds/lonely.wav", "x")
    make(two_folders)
    said = capsys.readouterr().out
    assert "5 rows (3 train, 2 val, 0 test), 2 classes (dog 2, cat 2), 1 without a class" in said
    assert "10 files linked, 0 copied" in said
    assert "1 left out: 1 no picture of that name" in said
    rows = [json.loads(line) for line in (two_folders / "out/metadata.jsonl").read_text().splitlines()]
    assert [(row.get("label"), row["text"], row["split"]) for row in rows[1:]] == [
        ("dog", "dog", "train"), ("dog", "dog", "train"), ("cat", "cat", "val"), ("cat", "cat", "val")]
    assert rows[0]["audio_file_name"] == "audio/-x.wav" and "label" not in rows[0]
    assert os.path.samefile(two_folders / "sounds/-x.wav", two_folders / "out/audio/-x.wav")
    [skipped] = csv.DictReader((two_folders / "out/skipped.csv").open())
    assert (skipped["file"], skipped["reason"]) == ("lonely.wav", "no picture of that name")
    read, bad = read_manifest(two_folders / "out")
    assert len(read) == 5 and not bad
    make(two_folders)
    assert "already complete" in capsys.readouterr().out
    make(two_folders, out="other", sounds="sounds/train", pictures="pictures/train")
    assert "other: split 'val' has no row (2 train, 0 val, 0 test)" in capsys.readouterr().out
    write(two_folders, "pictures/-x.png", "another picture")
    with pytest.raises(UserError, match="holds data made with"):
        make(two_folders)
    (two_folders / "sounds/train/dog/2.wav").unlink()
    with pytest.raises(UserError, match='"pairs": 5.*asked for.*"pairs": 4'):
        make(two_folders)


def test_a_pair_that_cannot_be_brought_is_listed_and_leaves_nothing(two_folders, capsys):
    (two_folders / "pictures/gone.png").symlink_to("/nowhere/gone.png")
    (two_folders / "sounds/gone.wav").write_bytes(b"x")
    strange = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8
    for name in (f"sounds/{strange}.wav", f"pictures/{strange}.png"):
        (two_folders / name).write_bytes(b"x")
    make(two_folders)
    assert "10 files linked" in capsys.readouterr().out
    assert len(read_manifest(two_folders / "out")[0]) == 5
    assert not (two_folders / "out/audio/gone.wav").exists()
    table = list(csv.DictReader((two_folders / "out/skipped.csv").open()))
    assert [(row["reason"], row["file"]) for row in table] == [
        ("a name that is not UTF-8", "'caf\\udce9.wav'"), ("cannot be read", "gone.wav")]


def test_labels_of_a_list_and_copies_on_another_file_system(two_folders, monkeypatch, capsys):
    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")
    monkeypatch.setattr(os, "link", no_links)
    labels = write(two_folders, "labels.csv", "file,label,text,split\ntrain/dog/1.wav,wolf,A wolf howls,\n"
                   "-x,bird,,test\n-x.png,bird,,\nnobody.wav,cat,,\n")
    make(two_folders, "--labels", str(labels))
    said = capsys.readouterr().out
    assert "3 of 5 pairs are not in it" in said and "0 files linked, 10 copied" in said
    rows = {row.audio: (row.label, row.text, row.split) for row in read_manifest(two_folders / "out")[0]}
    assert rows["audio/train/dog/1.wav"] == ("wolf", "A wolf howls", "train")
    assert rows["audio/-x.wav"] == ("bird", "bird", "test")
    assert rows["audio/train/dog/2.wav"] == ("dog", "dog", "train")
    reasons = [row["reason"] for row in csv.DictReader((two_folders / "out/skipped.csv").open())]
    assert reasons == ["listed twice", "in the list, and no pair"]
    for name in ("audio/-x.wav", "images/-x.png"):
        source = two_folders / name.replace("audio", "sounds").replace("images", "pictures")
        assert (two_folders / "out" / name).read_bytes() == source.read_bytes()


def test_folders_that_make_no_pairs_get_one_sentence(two_folders):
    (two_folders / "empty").mkdir()
    write(two_folders, "others/zebra.png", "x")
    write(two_folders, "list.csv", VGGSOUND[1])
    write(two_folders, "other.csv", "file,label\ndog.mp4,dog\n")
    write(two_folders, "hand/metadata.jsonl", "{}\n")
    for sounds, pictures, out, more, says in (
            ("empty", "pictures", "out", (), "--audio .*empty: holds no file that is a sound by its suffix"),
            ("sounds", "empty", "out", (), "--images .*empty: holds no file that is a picture by its suffix"),
            ("sounds", "none", "out", (), "none: no such folder"),
            ("sounds", "others", "out", (), "no sound has the base name of a picture"),
            ("sounds", "pictures", "sounds/out", (), "--out .*sounds/out: lies in the folder of --audio"),
            ("sounds", "pictures", ".", (), "holds the folder of --audio"),
            ("sounds", "pictures", "out", ("--labels", f"{two_folders}/list.csv"),
             "is a list of kind vggsound"),
            ("sounds", "pictures", "out", ("--labels", f"{two_folders}/other.csv"),
             "no row names a file of a pair: its first row names 'dog.mp4', the first pair is '-x.wav' and "),
            ("sounds", "pictures", "hand", (), "hand/metadata.jsonl: is not of this command")):
        with pytest.raises(UserError, match=says):
            make(two_folders, *more, sounds=sounds, pictures=pictures, out=out)


def test_every_kind_is_told():
    assert set(LISTS) == set(KINDS) - {"folders", "greatest-hits"}


# ---- each list with real files, through the command

def film(path: Path, seconds: int) -> Path:
    """A small film. In second k of it one hears 200 (k + 1) Hz, and sees a pattern in grey 50 + 12 k."""
    av = pytest.importorskip("av")
    pattern = 40 * np.sin(np.arange(64) * np.pi / 8)[:, None] * np.sin(np.arange(64) * np.pi / 8)
    with av.open(str(path), "w", format="mp4") as out:
        video, sound = out.add_stream("mpeg4", rate=4), out.add_stream("aac", rate=16_000)
        video.width = video.height = 64
        video.pix_fmt, sound.layout = "yuv420p", "mono"
        for k in range(seconds):
            pixels = np.repeat((pattern + 50 + 12 * k)[..., None], 3, 2).astype(np.uint8)
            for _ in range(4):
                out.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
            wave = 0.3 * np.sin(2 * np.pi * 200 * (k + 1) * np.arange(16_000) / 16_000)
            block = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
            block.sample_rate, block.pts = 16_000, k * 16_000
            out.mux(sound.encode(block))
        out.mux(video.encode())
        out.mux(sound.encode())
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("films")
    return {"whole": film(folder / "whole.mp4", 12), "cut": film(folder / "cut.mp4", 3)}


# --list: the list's name and text, {file: film}, and of each row in turn (label, text, split, the second of
# the film in which its window begins)
REAL = {
    "vggsound": (("v.csv", 'aaaaaaaaaaa,4,"dog, barking",train\n-_bbbbbbbbb,30,cat,test\n'
                  "ccccccccccc,3,cat,test\n"),
                 {"aaaaaaaaaaa.mp4": "whole", "deep/-_bbbbbbbbb_000030.MP4": "cut"},
                 [("dog, barking", "dog, barking", "train", 4), ("cat", "cat", "test", 0)]),
    "vggsound-test": (("test.csv", "-_bbbbbbbbb_000030.mp4,cat\n"), {"-_bbbbbbbbb_30000_40000.mp4": "cut"},
                      [("cat", "cat", "test", 0)]),
    "audiocaps": (("test.csv", "audiocap_id,youtube_id,start_time,caption\n1,aaaaaaaaaaa,5,A dog barks\n"
                   '2,aaaaaaaaaaa,5,"A dog, far away"\n'), {"Yaaaaaaaaaaa.mp4": "whole"}, [
                  (None, "A dog barks", "test", 5), (None, "A dog, far away", "test", 5)]),
    "audioset": (("eval_segments.csv", AUDIOSET[1].replace("--PJHxphWEs, 30.0, 40", "aaaaaaaaaaa, 2.0, 9")),
                 {"aaaaaaaaaaa.mp4": "whole"}, [("Speech+Gush", "Speech, Gush", "test", 2)]),
    "llp": (("AVVP_train.csv", "filename\tevent_labels\naaaaaaaaaaa_30_40\tSpeech,Baby_cry\n"),
            {"video/aaaaaaaaaaa.mp4": "cut"}, [("Speech+Baby_cry", "Speech, Baby cry", "train", 0)]),
    "plain": (("mine.csv", f"file,start_s,label,split\n{NFD} 1,6,dog,val\n"), {f"{NFC} 1.mp4": "whole"},
              [("dog", "dog", "val", 6)]),
    "folders": (None, {"test/splashing_water/a.mp4": "cut"},
                [("splashing_water", "splashing water", "test", 0)]),
    "greatest-hits": (None, {"x_denoised.mp4": "whole", "x_mic.mp4": "cut"}, [("wood", "wood", None, 3)])}


@pytest.mark.parametrize("kind", REAL)
def test_each_list_gives_the_right_part_of_real_files(tmp_path, films, kind):
    listed, files, expected = REAL[kind]
    for name, which in files.items():
        write(tmp_path, f"videos/{name}", films[which].read_bytes())
    write(tmp_path, "videos/x_times.txt", "3.5 wood hit static\n4 wood hit static\n")
    labels = ("--labels", str(write(tmp_path, *listed))) if listed else ()
    ontology = write(tmp_path, "ontology.json", json.dumps(ONTOLOGY))
    prepare_data.main(["videos", "--videos", f"{tmp_path}/videos", "--out", f"{tmp_path}/out", *labels,
                       "--list", kind, "--ontology", str(ontology), "--window-s", "2", "--workers", "1"])
    rows = read_manifest(tmp_path / "out")[0]
    assert [(row.label, row.text) for row in rows] == [row[:2] for row in expected]
    for row, (_, _, split, second) in zip(rows, expected, strict=True):
        assert split in (row.split, None)
        sound, rate = soundfile.read(row.audio_path)
        assert len(sound) == 2 * rate
        heard = np.abs(np.fft.rfft(sound[:rate][rate // 8:-rate // 8])).argmax() / 0.75  # Hz
        assert abs(heard - 200 * (second + 1)) < 20
        seen = (np.asarray(Image.open(row.image_path)).mean() - 50) / 12  # the second
        assert second - 0.7 < seen < second + 1.7


def test_a_wrong_list_ends_the_command_before_any_video_is_read(tmp_path, films):
    write(tmp_path, "videos/a.mp4", films["cut"].read_bytes())
    path = write(tmp_path, *AUDIOCAPS[:2])
    with pytest.raises(UserError, match="is a list of kind audiocaps .*, not vggsound as --list says"):
        prepare_data.main(["videos", "--videos", f"{tmp_path}/videos", "--labels", str(path), "--list",
                           "vggsound", "--out", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()
