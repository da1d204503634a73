#define _GNU_SOURCE
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int rs_status_fd = -1;

void
rs_report(const char *format, ...)
{
    char line[512];
    va_list args;

    if (rs_status_fd < 0)
        return;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (length < 0)
        return;
    if ((size_t)length >= sizeof line) {
        length = sizeof line - 1;
        line[length - 1] = '\n';
    }
    ssize_t written = write(rs_status_fd, line, (size_t)length);
    (void)written;
}

_Noreturn void
rs_die(const char *step, const char *detail)
{
    int error = errno;

    if (rs_status_fd >= 0)
        rs_report("error %s %d %s\n", step, error, detail ? detail : "");
    else
        dprintf(STDERR_FILENO, "raysandbox-launch: %s: %s [%s]\n", step,
                strerror(error), detail ? detail : "");
    _exit(EXIT_SETUP);
}

void
rs_write_map(int directory, const char *path, const char *text)
{
    int fd = openat(directory, path, O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        rs_die("open_map", path);
    if (write(fd, text, strlen(text)) != (ssize_t)strlen(text))
        rs_die("write_map", path);
    close(fd);
}
