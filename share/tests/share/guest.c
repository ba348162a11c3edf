/* PID 1 of the guest in `linux.rs`: mounts the share with Linux's own client and uses it as programs do.
 *
 * Lines that begin with a word are for the test on the host: `ok NAME`, `failed NAME: WHY`, `rate NAME BYTES MICROSECONDS`,
 * `done`. A virtio port cannot be mounted itself (the kernel reads only files that have `read_iter`), so two threads
 * copy between it and a socket pair, as an agent with a multiplexer does. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define RAW (16 << 20)
#define BULK (16 << 20)
#define CHUNK (1 << 20)

static const char *mode;
static char why[512];
static char *bulk;

/* Ends the calling check with what went wrong. */
#define NEED(condition) \
    do { \
        if (!(condition)) { \
            snprintf(why, sizeof why, "line %d: %s: %s", __LINE__, #condition, strerror(errno)); \
            return 0; \
        } \
    } while (0)
#define FAILS(call, number) NEED((call) < 0 && errno == (number))

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static int put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0) return -1;
    ssize_t n = write(fd, text, strlen(text));
    return close(fd) || n != (ssize_t)strlen(text) ? -1 : 0;
}

static int holds(const char *path, const char *text) {
    char got[4096];
    int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    ssize_t n = read(fd, got, sizeof got);
    close(fd);
    return n == (ssize_t)strlen(text) && !memcmp(got, text, n);
}

static int files(void) {
    struct stat st;
    int fd = open("new", O_RDWR | O_CREAT | O_EXCL, 0640);
    NEED(fd >= 0);
    FAILS(open("new", O_RDWR | O_CREAT | O_EXCL, 0640), EEXIST);
    NEED(write(fd, "hello", 5) == 5 && pwrite(fd, "J", 1, 0) == 1);
    NEED(!ftruncate(fd, 10000) && !fstat(fd, &st) && st.st_size == 10000 && (st.st_mode & 07777) == 0640);
    char end[4] = "xxx";
    NEED(pread(fd, end, 4, 9998) == 2 && !end[0] && !end[1]);
    NEED(!ftruncate(fd, 5) && !fsync(fd) && !fdatasync(fd) && !close(fd) && holds("new", "Jello"));
    NEED(!put("new", "cut") && holds("new", "cut") && !stat("new", &st) && st.st_size == 3);
    FAILS(open("none", O_RDONLY), ENOENT);
    FAILS(open("new/below", O_RDONLY), ENOTDIR);
    return 1;
}

static int appending(void) {
    NEED(!put("log", ""));
    int a = open("log", O_WRONLY | O_APPEND), b = open("log", O_WRONLY | O_APPEND);
    NEED(a >= 0 && b >= 0);
    NEED(write(a, "one ", 4) == 4 && write(b, "two ", 4) == 4 && write(a, "three", 5) == 5);
    NEED(!close(a) && !close(b) && holds("log", "one two three"));
    return 1;
}

static int unlinked(void) {
    struct stat st;
    char got[8];
    NEED(!put("gone", "still"));
    int fd = open("gone", O_RDWR);
    NEED(fd >= 0 && !unlink("gone"));
    FAILS(access("gone", F_OK), ENOENT);
    NEED(pread(fd, got, 5, 0) == 5 && !memcmp(got, "still", 5));
    NEED(pwrite(fd, "STILL!", 6, 0) == 6 && pread(fd, got, 6, 0) == 6 && !memcmp(got, "STILL!", 6));
    NEED(!fstat(fd, &st) && !ftruncate(fd, 1) && !close(fd));
    return 1;
}

static int renaming(void) {
    NEED(!put("from", "new") && !put("to", "old"));
    int old = open("to", O_RDONLY);
    char got[4];
    NEED(old >= 0 && !rename("from", "to") && holds("to", "new"));
    NEED(read(old, got, 3) == 3 && !memcmp(got, "old", 3) && !close(old));
    NEED(!mkdir("d1", 0755) && !mkdir("d1/sub", 0755) && !put("d1/sub/file", "deep"));
    int deep = open("d1/sub/file", O_RDWR);
    NEED(deep >= 0 && !rename("d1", "d2") && holds("d2/sub/file", "deep"));
    NEED(pwrite(deep, "DEEP", 4, 0) == 4 && !close(deep) && holds("d2/sub/file", "DEEP"));
    FAILS(rmdir("d2"), ENOTEMPTY);
    FAILS(rename("d2", "d2/sub/inside"), EINVAL);
    FAILS(rename("to", "d2"), EISDIR);
    NEED(!unlink("d2/sub/file") && !rmdir("d2/sub") && !rmdir("d2"));
    return 1;
}

static int links(void) {
    struct stat a, b;
    char target[64] = "";
    NEED(!put("first", "x") && !link("first", "second") && !stat("first", &a) && !stat("second", &b));
    NEED(a.st_ino == b.st_ino && b.st_nlink == 2 && !unlink("first") && holds("second", "x"));
    NEED(!symlink("second", "pointer") && readlink("pointer", target, 64) == 6 && holds("pointer", "x"));
    /* A link to what exists in the guest only: it is the guest that follows it. */
    NEED(!symlink("/here-only", "out") && !put("/here-only", "guest") && holds("out", "guest"));
    NEED(!unlink("out") && !unlink("pointer") && !unlink("second"));
    return 1;
}

static int listing(void) {
    char name[64];
    int count = 0, dots = 0;
    NEED(!mkdir("many", 0755));
    for (int i = 0; i < 400; i++) {
        snprintf(name, sizeof name, "many/file-with-a-longer-name-%04d", i);
        int fd = open(name, O_WRONLY | O_CREAT, 0600);
        NEED(fd >= 0 && !close(fd));
    }
    DIR *dir = opendir("many");
    NEED(dir);
    /* Removed while they are listed, as `rm -r` does it. */
    for (struct dirent *e; (e = readdir(dir));) {
        if (e->d_name[0] == '.') { dots++; continue; }
        NEED(e->d_type == DT_REG && !unlinkat(dirfd(dir), e->d_name, 0));
        count++;
    }
    NEED(!closedir(dir) && count == 400 && dots == 2 && !rmdir("many"));
    return 1;
}

static int names(void) {
    char name[256];
    for (int i = 0; i < 255; i++) name[i] = (char)(i == '/' || i == 0 ? '_' : i);
    name[255] = 0;
    NEED(!put(name, "any") && holds(name, "any"));
    DIR *dir = opendir(".");
    int found = 0;
    for (struct dirent *e; (e = readdir(dir));) found += !strcmp(e->d_name, name);
    closedir(dir);
    NEED(found == 1 && !unlink(name));
    return 1;
}

static int attributes(void) {
    struct stat st;
    struct statfs fs;
    NEED(!put("attr", "x") && !chmod("attr", 0604) && !chown("attr", 1000, 100));
    struct timespec times[2] = {{1000000000, 1}, {1234567890, 987654321}};
    NEED(!utimensat(AT_FDCWD, "attr", times, 0) && !stat("attr", &st));
    /* This client cuts what is set down to seconds. */
    NEED(st.st_mtim.tv_sec == 1234567890 && st.st_atim.tv_sec == 1000000000);
    NEED((st.st_mode & 07777) == 0604 && st.st_uid == 1000 && st.st_gid == 100);
    NEED(!statfs(".", &fs) && fs.f_type == 0x01021997 && fs.f_bavail > 0 && fs.f_namelen == 255);
    return 1;
}

static int extended(void) {
    char got[128] = "", large[3000];
    memset(large, 'v', sizeof large);
    NEED(!put("x", "x") && !setxattr("x", "user.one", "first", 5, XATTR_CREATE));
    NEED(!setxattr("x", "user.large", large, sizeof large, 0));
    NEED(getxattr("x", "user.one", got, sizeof got) == 5 && !memcmp(got, "first", 5));
    NEED(getxattr("x", "user.large", large, sizeof large) == sizeof large);
    FAILS(getxattr("x", "user.large", got, 10), ERANGE);
    FAILS(setxattr("x", "user.one", "y", 1, XATTR_CREATE), EEXIST);
    NEED(listxattr("x", got, sizeof got) == 9 + 11 && !removexattr("x", "user.one"));
    FAILS(getxattr("x", "user.one", got, sizeof got), ENODATA);
    FAILS(removexattr("x", "user.one"), ENODATA);
    return 1;
}

static int set(int fd, int command, int type, off_t start, off_t length) {
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
    return fcntl(fd, command, &lock);
}

static int locks(void) {
    /* The test on the host holds bytes 100 to 199 of this one. */
    int fd = open("locked", O_RDWR), again = open("locked", O_RDWR);
    NEED(fd >= 0 && again >= 0);
    FAILS(set(fd, F_SETLK, F_WRLCK, 150, 1), EAGAIN);
    NEED(!set(fd, F_SETLK, F_WRLCK, 0, 100) && !set(again, F_SETLK, F_WRLCK, 50, 50));
    struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 0};
    NEED(!fcntl(fd, F_GETLK, &lock) && lock.l_type == F_WRLCK && lock.l_start == 100 && lock.l_len == 100);
    pid_t child = fork();
    if (!child) _exit(set(fd, F_SETLK, F_RDLCK, 10, 1) < 0 && errno == EAGAIN ? 0 : 1);
    int status = -1;
    NEED(waitpid(child, &status, 0) == child && status == 0);
    NEED(!set(fd, F_SETLK, F_UNLCK, 0, 0) && !close(again) && !close(fd));
    int reader = open("attr", O_RDONLY);
    /* As `flock FILE COMMAND` does it. */
    NEED(reader >= 0 && !flock(reader, LOCK_EX | LOCK_NB) && !flock(reader, LOCK_UN) && !close(reader));
    return 1;
}

static int special(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
    char got[8];
    NEED(!mkfifo("pipe", 0600));
    int fd = open("pipe", O_RDWR);
    NEED(fd >= 0 && write(fd, "piped", 5) == 5 && read(fd, got, 5) == 5 && !close(fd) && !unlink("pipe"));
    int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    NEED(!bind(server, (void *)&address, sizeof address) && !listen(server, 1));
    NEED(!connect(client, (void *)&address, sizeof address) && !close(client) && !close(server) && !unlink("socket"));
    FAILS(mknod("device", S_IFCHR | 0666, makedev(1, 3)), EPERM);
    return 1;
}

static int mapped(void) {
    NEED(!put("map", "mapped for reading"));
    /* Without a cache, nothing can be mapped that could be written through the mapping. */
    int fd = open("map", strcmp(mode, "none") ? O_RDWR : O_RDONLY);
    char *at = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    NEED(at != MAP_FAILED && !memcmp(at, "mapped", 6) && !munmap(at, 4096));
    if (strcmp(mode, "none")) {
        at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        NEED(at != MAP_FAILED);
        memcpy(at, "MAPPED", 6);
        NEED(!msync(at, 4096, MS_SYNC) && !munmap(at, 4096));
    }
    return !close(fd);
}

static int shell(void) {
    int status = system(
        "/bin/busybox sh -ec '"
        "b=/bin/busybox; $b mkdir -p tree/a/b tree/c; i=0;"
        "while [ $i -lt 10 ]; do echo content $i > tree/a/b/f$i; $b ln -s ../a/b/f$i tree/c/l$i; i=$((i+1)); done;"
        "$b chmod 751 tree/a; $b cp -a tree copy; $b diff -r tree copy;"
        "$b tar cf tree.tar tree; $b mkdir unpacked; $b tar xf tree.tar -C unpacked; $b diff -r tree unpacked/tree;"
        "[ $($b find unpacked | $b wc -l) = 25 ]; $b sed -i s/content/changed/ tree/a/b/f7;"
        "[ \"$($b cat tree/c/l7)\" = \"changed 7\" ]; echo more >> tree/a/b/f7; [ $($b wc -l < tree/a/b/f7) = 2 ];"
        "$b rm -r tree copy unpacked tree.tar; [ ! -e tree ]'");
    NEED(status == 0);
    return 1;
}

static int throughput(void) {
    char name[64];
    int fd = open("bulk", O_RDWR | O_CREAT | O_TRUNC, 0644);
    NEED(fd >= 0);
    for (int i = 0; i < CHUNK; i++) bulk[i] = (char)(i * 31 + i / 4096);
    long long from = now();
    for (int i = 0; i < BULK / CHUNK; i++) NEED(write(fd, bulk, CHUNK) == CHUNK);
    NEED(!fsync(fd) && !close(fd));
    long long written = now() - from;
    NEED(!system("echo 3 > /proc/sys/vm/drop_caches") && (fd = open("bulk", O_RDONLY)) >= 0);
    from = now();
    for (int i = 0; i < BULK / CHUNK; i++)
        for (int n = 0, got; n < CHUNK; n += got) NEED((got = read(fd, bulk + n, CHUNK - n)) > 0);
    long long read = now() - from;
    for (int i = 0; i < CHUNK; i++) NEED(bulk[i] == (char)(i * 31 + i / 4096));
    from = now();
    struct stat st;
    for (int i = 0; i < 200; i++) {
        snprintf(name, sizeof name, "missing-%d", i);
        NEED(stat(name, &st) < 0 && !fstat(fd, &st));
    }
    printf("rate write-%s %d %lld\nrate read-%s %d %lld\nrate lookups-%s 200 %lld\n", mode, BULK, written, mode, BULK, read,
           mode, now() - from);
    return !close(fd) && !unlink("bulk");
}

/* The other share: one file, which only the host makes read-only. */
static int single(void) {
    struct stat st;
    NEED(!chdir("/single") && holds("only", "read me"));
    FAILS(open("only", O_RDWR), EROFS);
    FAILS(open("only", O_RDONLY | O_TRUNC), EROFS);
    FAILS(open("other", O_RDWR | O_CREAT, 0600), EROFS);
    FAILS(chmod("only", 0777), EROFS);
    FAILS(unlink("only"), EROFS);
    FAILS(rename("only", "other"), EROFS);
    FAILS(mkdir("other", 0700), EROFS);
    FAILS(setxattr("only", "user.x", "x", 1, 0), EROFS);
    FAILS(stat("other", &st), ENOENT);
    NEED(!put("/target", "") && !mount("only", "/target", NULL, MS_BIND, NULL) && holds("/target", "read me"));
    return !umount("/target") && !chdir("/");
}

static const struct { const char *name; int (*check)(void); } checks[] = {
    {"files", files}, {"appending", appending}, {"unlinked", unlinked}, {"renaming", renaming}, {"links", links},
    {"listing", listing}, {"names", names}, {"attributes", attributes}, {"extended", extended}, {"locks", locks},
    {"special", special}, {"mapped", mapped}, {"shell", shell}, {"throughput", throughput},
};

struct pump { int from, to; };

static void *copy(void *argument) {
    struct pump *pump = argument;
    static __thread char buffer[1 << 16];
    ssize_t got;
    while ((got = read(pump->from, buffer, sizeof buffer)) > 0)
        for (ssize_t done = 0, n; done < got; done += n)
            if ((n = write(pump->to, buffer + done, got - done)) <= 0) return NULL;
    return NULL;
}

/* By its name: numbers depend on the other devices. */
static int port(const char *wanted) {
    char path[300], name[64];
    for (;;) {
        DIR *dir = opendir("/sys/class/virtio-ports");
        for (struct dirent *e; dir && (e = readdir(dir));) {
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", e->d_name);
            int fd = open(path, O_RDONLY);
            ssize_t n = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
            if (fd >= 0) close(fd);
            name[n > 0 ? n - 1 : 0] = 0;
            if (strcmp(name, wanted)) continue;
            snprintf(path, sizeof path, "/dev/%s", e->d_name);
            closedir(dir);
            /* Until the driver has heard that the host is there, a port reads as if it had ended. */
            struct pollfd host = {open(path, O_RDWR), POLLIN, 0};
            while (host.fd >= 0 && poll(&host, 1, 0) >= 0 && host.revents & POLLHUP) usleep(1000);
            return host.fd;
        }
        if (dir) closedir(dir);
        usleep(1000);
    }
}

/* Mounts over a port: the copying thread towards the guest lives as long as the port, the other as long as the mount. */
static int mounted(int port, const char *at, const char *cache) {
    static struct pump pumps[16];
    static int used;
    int pair[2];
    char options[128];
    pthread_t thread;
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    pumps[used] = (struct pump){port, pair[0]};
    pthread_create(&thread, NULL, copy, &pumps[used++]);
    pumps[used] = (struct pump){pair[0], port};
    pthread_create(&thread, NULL, copy, &pumps[used++]);
    snprintf(options, sizeof options, "trans=fd,rfdno=%d,wfdno=%d,version=9p2000.L,msize=1048576,access=client,cache=%s",
             pair[1], pair[1], cache);
    int done = mount("share", at, "9p", MS_NODEV, options);
    close(pair[1]);
    return done;
}

static void raw(int port) {
    long long from = 0;
    for (int n = 0, got; n < RAW; n += got) {
        got = read(port, bulk, CHUNK < RAW - n ? CHUNK : RAW - n);
        if (!from) from = now();
        if (got <= 0) { printf("failed raw: %s\n", strerror(errno)); return; }
    }
    printf("rate raw-read %d %lld\n", RAW, now() - from);
    from = now();
    for (int n = 0, put; n < RAW; n += put)
        if ((put = write(port, bulk, CHUNK < RAW - n ? CHUNK : RAW - n)) <= 0) { printf("failed raw: %s\n", strerror(errno)); return; }
    printf("rate raw-write %d %lld\n", RAW, now() - from);
}

int main(void) {
    const char *directories[] = {"/proc", "/sys", "/dev", "/none", "/mmap", "/loose", "/single", "/tmp"};
    for (int i = 0; i < 8; i++) mkdir(directories[i], 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int fd = 0; fd < 3; fd++) dup2(console, fd);
    setvbuf(stdout, NULL, _IOLBF, 0);
    FILE *list = fopen("/modules", "r");
    for (char name[128]; list && fgets(name, sizeof name, list);) {
        name[strcspn(name, "\n")] = 0;
        int fd = open(name, O_RDONLY);
        if (syscall(SYS_finit_module, fd, "", 0)) printf("failed module %s: %s\n", name, strerror(errno));
        close(fd);
    }
    bulk = malloc(CHUNK);
    memset(bulk, 1, CHUNK);
    raw(port("kiln.raw"));
    const char *modes[] = {"none", "mmap", "loose"};
    for (int m = 0; m < 3; m++) {
        char place[16];
        mode = modes[m];
        snprintf(place, sizeof place, "kiln.%s", mode);
        int at = port(place);
        snprintf(place, sizeof place, "/%s", mode);
        umask(0);
        if (mounted(at, place, mode) || chdir(place)) { printf("failed mount %s: %s\n", mode, strerror(errno)); continue; }
        for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
            int ok = checks[i].check();
            printf(ok ? "ok %s %s\n" : "failed %s %s: %s\n", checks[i].name, mode, why);
            chdir(place);
        }
        chdir("/");
        FILE *mounts = fopen("/proc/mounts", "r");
        for (char line[512]; mounts && fgets(line, sizeof line, mounts);)
            if (strstr(line, " 9p ")) printf("mounted %s", line);
        fclose(mounts);
        printf(umount(place) ? "failed umount %s\n" : "ok umount %s\n", mode);
    }
    if (mounted(port("kiln.single"), "/single", "none")) printf("failed mount single: %s\n", strerror(errno));
    printf(single() ? "ok single\n" : "failed single: %s\n", why);
    printf("done\n");
    fflush(stdout);
    reboot(RB_AUTOBOOT);
    for (;;) pause();
}
