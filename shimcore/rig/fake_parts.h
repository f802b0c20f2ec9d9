/* What fake_runtime.c needs of files and of JSON: values found by their keys, and arrays of strings. */
#ifndef FAKE_PARTS_H
#define FAKE_PARTS_H
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- files ---- */

static char *path(const char *a, const char *b, const char *c)
{
    char *out;
    if (asprintf(&out, "%s/%s%s%s", a, b, c ? "/" : "", c ? c : "") < 0)
        abort();
    return out;
}

static char *slurp(const char *name)
{
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    size_t n = 0, cap = 16384;
    char *text = malloc(cap);
    ssize_t got;
    while (text && (got = read(fd, text + n, cap - n - 1)) > 0)
        if ((n += (size_t)got) == cap - 1)
            text = realloc(text, cap *= 2);
    close(fd);
    if (text)
        text[n] = 0;
    return text;
}

static void append(const char *name, const char *text)
{
    int fd = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        perror(name);
    if (fd >= 0)
        close(fd);
}

/* In one step, as runc does: a reader never sees half a pid. */
static bool replace(const char *name, const char *text)
{
    char *new = path(name, "", NULL);
    strcpy(new + strlen(name), "~");
    int fd = open(new, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    bool ok = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0)
        close(fd);
    return ok && rename(new, name) == 0;
}

/* ---- just enough JSON: a value found by its keys, and an array of strings ---- */

static const char *blanks(const char *p)
{
    return p + strspn(p, " \t\r\n");
}

static const char *skip(const char *p)
{
    int depth = 0;
    p = blanks(p);
    do {
        if (*p == '"') {
            for (p++; *p && *p != '"'; p++)
                if (*p == '\\' && p[1])
                    p++;
            p += *p == '"';
        } else if (*p == '{' || *p == '[') {
            depth++, p++;
        } else if (*p == '}' || *p == ']') {
            depth--, p++;
        } else if (*p && strchr(",: \t\r\n", *p)) {
            p++;
        } else {
            p += strcspn(p, ",:{}[]\" \t\r\n");
        }
    } while (*p && depth > 0);
    return blanks(p);
}

static const char *member(const char *p, const char *name)
{
    size_t n = strlen(name);
    if (!p || *(p = blanks(p)) != '{')
        return NULL;
    for (p = blanks(p + 1); *p == '"';) {
        bool hit = strncmp(p + 1, name, n) == 0 && p[n + 1] == '"';
        p = skip(p);
        p = blanks(p + (*p == ':'));
        if (hit)
            return p;
        p = skip(p);
        p = blanks(p + (*p == ','));
    }
    return NULL;
}

static char *string(const char **at)
{
    const char *p = *at + 1;
    char *out = malloc(strlen(p) + 1), *w = out;
    for (; out && *p && *p != '"'; p++) {
        if (*p != '\\') {
            *w++ = *p;
        } else if (*++p == 'u') {
            *w++ = (char)strtol((char[]){p[3], p[4], 0}, NULL, 16); /* what a test writes: control characters */
            p += 4;
        } else {
            *w++ = *p == 'n' ? '\n' : *p == 't' ? '\t' : *p;
        }
    }
    *at = p + (*p == '"');
    if (out)
        *w = 0;
    return out;
}

static char **strings(const char *p)
{
    size_t n = 0;
    char **out = calloc(4096, sizeof *out);
    if (!out || !p || *p != '[')
        return out;
    for (p = blanks(p + 1); *p == '"' && n < 4095; p = blanks(p + (*p == ','))) {
        out[n++] = string(&p);
        p = blanks(p);
    }
    return out;
}
#endif
