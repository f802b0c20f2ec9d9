/* A template that answers at once and does nothing: what is left of a warm start is the launcher's own time. PATH of its socket.
 *
 * It takes the request, says "R", hears "G", and tells an address of no daemon; see shimcore/launcher/launcher.c. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    static const char address[] = "unix:///run/containerd/s/0123456789012345678901234567890123456789012345678901234567890123";
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc != 2 || strlen(argv[1]) >= sizeof a.sun_path)
        return 2;
    strcpy(a.sun_path, argv[1]);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(fd, 16) < 0)
        return 1;
    printf("ok\n");
    fflush(stdout);
    for (;;) {
        static char request[1 << 20];
        int64_t length = 0;
        size_t n = 0;
        int c = accept(fd, NULL, NULL);
        ssize_t got;
        while ((n < sizeof length || n < (size_t)length + sizeof length) && (got = read(c, request + n, sizeof request - n)) > 0) {
            n += (size_t)got;
            if (n >= sizeof length)
                memcpy(&length, request, sizeof length);
        }
        if (write(c, "R", 1) == 1 && read(c, request, 1) == 1) {
            uint32_t head[3] = {0, sizeof address - 1, 0};
            char reply[sizeof head + sizeof address];
            memcpy(reply, head, sizeof head);
            memcpy(reply + sizeof head, address, sizeof address - 1);
            if (write(c, reply, sizeof head + sizeof address - 1) > 0 && read(c, request, 1) < 0) {
                /* It has printed the address, or not. */
            }
        }
        close(c);
    }
}
