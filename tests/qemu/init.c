/* The first process of the test machine that QEMU boots.
 *
 * Theory of operation.  The initramfs holds this program and the modules.  It
 * mounts the host's tree (9p, read-only) below an overlay in memory, fresh file
 * systems where a machine has its own, and cgroup version 2 with its controllers
 * on; reads what to run from the second 9p share ("out"), runs it, reaps what
 * it leaves, writes how it ended to the same share, and restarts the machine,
 * at which QEMU exits.
 *
 *   /out/argv     arguments, each ended by a zero byte
 *   /out/environ  environment, the same
 *   /out/cwd      directory
 *   /out/uid      whom to run it as
 *   /out/exit     (written) exit status, 128+N for signal N
 *
 * The command's stdin is /dev/null, its stdout and stderr are /dev/ttyS1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { MAX_WORDS = 512, MAX_BYTES = 1 << 18 };

static void
end_machine(void)
{
    sync();
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

static void
die(const char *step, const char *detail)
{
    fprintf(stderr, "qemu init: %s %s: %s\n", step, detail, strerror(errno));
    end_machine();
}

static void
must_mount(const char *source, const char *target, const char *type,
           unsigned long flags, const char *options)
{
    if (mkdir(target, 0755) < 0 && errno != EEXIST)
        die("mkdir", target);
    if (mount(source, target, type, flags, options) < 0)
        die("mount", target);
}

static void
write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text) ||
        close(fd) < 0)
        die("write", path);
}

/* The file's bytes with a zero after them; its length in *length. */
static char *
read_file(const char *path, size_t *length)
{
    char *bytes = calloc(1, MAX_BYTES + 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t got = 0;
    ssize_t n;

    if (fd < 0 || bytes == NULL)
        die("read", path);
    while (got < MAX_BYTES && (n = read(fd, bytes + got, MAX_BYTES - got)) > 0)
        got += (size_t)n;
    close(fd);
    if (length)
        *length = got;
    return bytes;
}

static char **
read_words(const char *path)
{
    static const char *too_many = "too many words";
    size_t length, used = 0;
    char *bytes = read_file(path, &length);
    char **words = calloc(MAX_WORDS + 1, sizeof *words);

    if (words == NULL)
        die("read", path);
    for (size_t at = 0; at < length; at += strlen(bytes + at) + 1) {
        if (used == MAX_WORDS)
            die(too_many, path);
        words[used++] = bytes + at;
    }
    return words;
}

static void
load_modules(void)
{
    char *order = read_file("/modules/order", NULL);

    for (char *name = strtok(order, "\n"); name; name = strtok(NULL, "\n")) {
        char path[256];
        snprintf(path, sizeof path, "/modules/%s.ko", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
            die("module", name);
        close(fd);
    }
}

/* The host's tree, writable in memory: /root may get another mode, caches may
 * be written, and the host sees nothing of it. */
static void
mount_root(void)
{
    must_mount("host", "/host", "9p", MS_RDONLY,
               "trans=virtio,version=9p2000.L,cache=loose,msize=1048576");
    must_mount("tmpfs", "/memory", "tmpfs", 0, "mode=755");
    mkdir("/memory/upper", 0755);
    mkdir("/memory/work", 0755);
    must_mount("overlay", "/root", "overlay", 0,
               "lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work");
    must_mount("dev", "/root/dev", "devtmpfs", MS_NOSUID, "");
    must_mount("shm", "/root/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    must_mount("devpts", "/root/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
               "gid=5,mode=620,ptmxmode=666");
    must_mount("proc", "/root/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    must_mount("sys", "/root/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
    must_mount("cgroup2", "/root/sys/fs/cgroup", "cgroup2",
               MS_NOSUID | MS_NODEV | MS_NOEXEC, "nsdelegate");
    must_mount("tmp", "/root/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    must_mount("var-tmp", "/root/var/tmp", "tmpfs", 0, "mode=1777");
    must_mount("run", "/root/run", "tmpfs", MS_NOSUID, "mode=755");
    must_mount("out", "/root/out", "9p", 0,
               "trans=virtio,version=9p2000.L,cache=none,msize=262144");
    if (chdir("/root") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 ||
        chroot(".") < 0 || chdir("/") < 0)
        die("switch", "root");
    /* As systemd does: leaks through propagation must show. */
    if (mount(NULL, "/", NULL, MS_REC | MS_SHARED, NULL) < 0)
        die("share", "/");
}

/* Controllers on for every group below the root, and a group of its own for
 * the command, delegated to whom it runs as (cgroups(7)). */
static void
make_groups(uid_t uid)
{
    static const char *files[] = {"cgroup.procs", "cgroup.threads",
                                  "cgroup.subtree_control"};
    const char *top = "/sys/fs/cgroup/session";
    const char *leaf = "/sys/fs/cgroup/session/command";

    write_file("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +memory +pids +io");
    if (mkdir(top, 0755) < 0 || mkdir(leaf, 0755) < 0)
        die("mkdir", leaf);
    if (uid != 0) {
        for (int i = 0; i < 6; i++) {
            char path[256];
            snprintf(path, sizeof path, "%s/%s", i < 3 ? top : leaf, files[i % 3]);
            if (chown(path, uid, uid) < 0)
                die("chown", path);
        }
        if (chown(top, uid, uid) < 0 || chown(leaf, uid, uid) < 0)
            die("chown", top);
    }
}

static void
loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        die("loopback", "up");
    close(fd);
}

/* Output as it was written: no "\r\n", no echo. */
static int
open_terminal(void)
{
    struct termios mode;
    int fd = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);

    if (fd < 0 || tcgetattr(fd, &mode) < 0)
        die("open", "/dev/ttyS1");
    cfmakeraw(&mode);
    if (tcsetattr(fd, TCSANOW, &mode) < 0)
        die("tcsetattr", "/dev/ttyS1");
    return fd;
}

static void
become(int terminal, uid_t uid)
{
    char **argv = read_words("/out/argv"), **environment = read_words("/out/environ");
    char *cwd = read_file("/out/cwd", NULL);

    write_file("/sys/fs/cgroup/session/command/cgroup.procs", "0");
    if (dup2(open("/dev/null", O_RDONLY | O_CLOEXEC), 0) < 0 ||
        dup2(terminal, 1) < 0 || dup2(terminal, 2) < 0)
        die("dup2", "");
    setsid();
    if (chdir(cwd) < 0)
        die("chdir", cwd);
    if (uid != 0) {
        /* Homes are closed to others, and the interpreter may live in one. */
        chmod("/root", 0755);
        if (setgroups(0, NULL) < 0 || setresgid(uid, uid, uid) < 0 ||
            setresuid(uid, uid, uid) < 0)
            die("setresuid", "");
    }
    environ = environment;
    execvp(argv[0], argv);
    dprintf(2, "qemu init: %s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

int
main(void)
{
    int status = 0, terminal, code;
    char text[16];
    uid_t uid;
    pid_t child, ended;

    load_modules();
    mount_root();
    loopback_up();
    uid = (uid_t)strtoul(read_file("/out/uid", NULL), NULL, 10);
    make_groups(uid);
    sethostname("second-kernel", 13);
    terminal = open_terminal();
    child = fork();
    if (child < 0)
        die("fork", "");
    if (child == 0)
        become(terminal, uid);
    do
        ended = waitpid(-1, &status, 0);
    while (ended != child && !(ended < 0 && errno == ECHILD));
    code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    tcdrain(terminal);
    snprintf(text, sizeof text, "%d\n", code);
    write_file("/out/exit", text);
    end_machine();
}
