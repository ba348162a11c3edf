# Builds zstd, $2, in the view $1, and changes it there; then runs the tests of Python's standard library from a copy.
set -e
cd "$1"
export HOME="$1" TMPDIR="$1" PYTHONDONTWRITEBYTECODE=
cp -r "$2" zstd
cd zstd
cat > Makefile.view <<'END'
SOURCES := $(wildcard common/*.c compress/*.c decompress/*.c)
OBJECTS := $(SOURCES:.c=.o)
CFLAGS := -O0 -DZSTD_DISABLE_ASM
roundtrip: roundtrip.o libzstd.a
	$(CC) -o $@ $^
libzstd.a: $(OBJECTS)
	rm -f $@
	ar rcs $@ $^
-include $(OBJECTS:.o=.d)
%.o: %.c
	$(CC) $(CFLAGS) -MMD -c -o $@ $<
END
cat > roundtrip.c <<'END'
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "zstd.h"
int main(int argc, char **argv) {
    FILE *file = fopen(argv[1], "rb");
    static char text[1 << 20], packed[1 << 21], again[1 << 20];
    size_t length = fread(text, 1, sizeof text, file);
    size_t size = ZSTD_compress(packed, sizeof packed, text, length, 3);
    if (argc != 2 || ZSTD_isError(size) || ZSTD_decompress(again, sizeof again, packed, size) != length) return 1;
    printf("%zu %d\n", length, size < length && memcmp(text, again, length) == 0);
    return 0;
}
END
make -s -j4 -f Makefile.view
test "$(./roundtrip compress/zstd_compress.c)" = "$(wc -c < compress/zstd_compress.c) 1"
make -q -f Makefile.view
touch common/zstd_common.c
before=$(stat -c %Y%y common/xxhash.o)
! make -q -f Makefile.view
make -s -f Makefile.view
test "$before" = "$(stat -c %Y%y common/xxhash.o)"
make -q -f Makefile.view
cd ..

# Modules are imported from the view, their caches written there.
library=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
mkdir python
tar -C "$library" --exclude=__pycache__ --exclude=dist-packages --exclude='config-*' -cf - . | tar -C python -xf -
cat > suite.py <<'END'
import json, pathlib, shutil, sqlite3, subprocess, sys, tempfile, unittest, zipfile
from concurrent.futures import ProcessPoolExecutor
here = pathlib.Path(__file__).parent
class InTheView(unittest.TestCase):
    def test_modules_come_from_here(self):
        for module in (json, shutil, tempfile, unittest):
            self.assertTrue(module.__file__.startswith(str(here)), module.__file__)
            self.assertTrue(pathlib.Path(module.__cached__).exists())
    def test_a_tree_is_packed_copied_and_removed(self):
        with tempfile.TemporaryDirectory(dir=here) as place:
            place = pathlib.Path(place)
            packed = shutil.make_archive(str(place / "packed"), "zip", here / "python" / "json")
            shutil.unpack_archive(packed, place / "again")
            names = sorted(p.name for p in (place / "again").glob("*.py"))
            self.assertEqual(names, sorted(p.name for p in (here / "python" / "json").glob("*.py")))
            self.assertIsNone(zipfile.ZipFile(packed).testzip())
            shutil.copytree(place / "again", place / "copy", symlinks=True)
            shutil.move(place / "copy", place / "moved")
            self.assertFalse((place / "copy").exists())
    def test_processes_write_one_database(self):
        with sqlite3.connect(here / "shared.db") as base:
            base.execute("create table t (n)")
        with ProcessPoolExecutor(4) as pool:
            list(pool.map(insert, range(40)))
        with sqlite3.connect(here / "shared.db") as base:
            self.assertEqual(base.execute("select sum(n) from t").fetchone(), (780,))
    def test_a_module_is_written_and_imported(self):
        (here / "made.py").write_text("answer = 42\n")
        told = subprocess.run([sys.executable, "-c", "import made; print(made.answer)"], cwd=here, capture_output=True)
        self.assertEqual(told.stdout, b"42\n")
def insert(n):
    with sqlite3.connect(here / "shared.db", timeout=60) as base:
        base.execute("insert into t values (?)", (n,))
END
PYTHONPATH="$1/python" python3 -m unittest -q suite
# Those that the distribution ships with the library.
if test -e python/test/test_support.py; then
    PYTHONPATH="$1/python" python3 -m unittest -q test.test_support
fi
