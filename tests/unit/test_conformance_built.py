"""Which tests of a suite that somebody has built are run."""

from pathlib import Path

from conformance import built


def test_of_ltps_lists_the_tests_about_files_are_taken_and_no_remarks(tmp_path: Path) -> None:
    programs, lists = tmp_path / "testcases" / "bin", tmp_path / "runtest"
    programs.mkdir(parents=True)
    lists.mkdir()
    for name in ("rename01", "fs_perms", "getpid01"):
        (programs / name).touch(0o755)
    (lists / "syscalls").write_text(
        "#DESCRIPTION\n\nrename01 rename01 -v\nrename02 rename02\ngetpid01 getpid01\n"
    )
    (lists / "fs_perms_simple").write_text("# fs_perms file_mode file_uid\nfs_perms01 fs_perms 005 99\n")
    assert list(built._tests(tmp_path)) == [("rename01", "rename01 -v"), ("fs_perms01", "fs_perms 005 99")]
