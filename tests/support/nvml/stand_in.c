/* A stand-in for NVIDIA's libnvidia-ml.so.1: no GPU, no driver, only figures that a test chose.
 *
 * It holds as much of the library's binary interface (docs.nvidia.com/deploy/nvml-api) as the GPU
 * sampler calls, so that the real bindings (pynvml, ctypes) are tested through their real path.
 * What it is told stands in the file that STAGESCOPE_NVML_STAND_IN names, a line each, read anew
 * at every call: see README.md beside this file. Each call is added to that file's name + ".calls".
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef u32 ret;

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7,
       NOT_LOADED = 9, TIMED_OUT = 10 };
enum { DOUBLE = 0, U32 = 1, U64 = 3 };
enum { DEVICES = 8, INSTANCES = 7, LINE = 256, PERIOD_US = 50000, KEPT = 200 };

typedef union { double d; u32 u; unsigned long ul; u64 ull; long long sll; int si; unsigned short us; } value_t;
typedef struct { u64 stamp; value_t value; } sample_t;
typedef struct { u32 id, scope; long long stamp, latency; u32 type; ret outcome; value_t value; } field_t;
typedef struct { u64 total, free, used; } memory_t;
typedef struct { u32 version; u64 total, reserved, free, used; } memory_v2_t;
typedef struct { u32 gpu, memory; } rates_t;
typedef struct { u32 pid; u64 used; u32 gpu_instance, compute_instance; } process_t;
typedef struct { u32 pid; u64 stamp; u32 sm, memory, enc, dec; } process_util_t;
typedef struct { u32 version; u32 sensor; int celsius; } temperature_t;
typedef struct { void *device; u64 type, data; u32 gpu_instance, compute_instance; } event_t;
typedef struct { u32 version, supported; } gpm_support_t;
typedef struct { u32 id; ret outcome; double value; const char *names[3]; } gpm_metric_t;
typedef struct { u64 us; u32 device; int instance; } gpm_sample_t;
typedef struct { u32 version, count; gpm_sample_t *before, *after; gpm_metric_t metrics[]; } gpm_get_t;

/* A device's handle points here; instance is -1 for a whole device. */
typedef struct { u32 device; int instance; } handle_t;

static handle_t whole[DEVICES], parts[DEVICES][INSTANCES];
static int inits;
static u64 events_given;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static u64 now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (u64)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void sleep_ms(double ms) {
    struct timespec pause = {(time_t)(ms / 1000), (long)((ms - 1000.0 * (time_t)(ms / 1000)) * 1e6)};
    nanosleep(&pause, NULL);
}

/* Give the next line of the control file that begins with this word, without it; file is kept. */
static int line_of(FILE *file, const char *word, char *rest) {
    char line[LINE];
    size_t length = strlen(word);
    while (file && fgets(line, LINE, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, word, length) && line[length] == ' ') {
            strcpy(rest, line + length + 1);
            return 1;
        }
    }
    return 0;
}

static FILE *control(void) {
    const char *path = getenv("STAGESCOPE_NVML_STAND_IN");
    return path ? fopen(path, "re") : NULL;
}

/* "KEY DEVICE VALUE": the value for this device, or for all ("*"). */
static double setting(const char *key, u32 device, double otherwise) {
    char rest[LINE], of[LINE];
    double value, found = otherwise;
    FILE *file = control();
    while (line_of(file, key, rest))
        if (sscanf(rest, "%255s %lf", of, &value) == 2 && (*of == '*' || (u32)atoi(of) == device))
            found = value;
    if (file) fclose(file);
    return found;
}

static void called(const char *function, int device) {
    char path[LINE * 2], line[LINE];
    const char *control_path = getenv("STAGESCOPE_NVML_STAND_IN");
    if (!control_path) return;
    snprintf(path, sizeof path, "%s.calls", control_path);
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file < 0) return;
    int length = snprintf(line, LINE, "%s %d\n", function, device);
    if (write(file, line, length) < 0) {}
    close(file);
}

/* "fail FUNCTION DEVICE CODE" and "slow FUNCTION DEVICE MILLISECONDS"; device may be "*". */
static ret begin(const char *function, int device) {
    char rest[LINE], name[LINE], of[LINE];
    double figure;
    ret outcome = OK;
    called(function, device);
    const char *words[] = {"slow", "fail"};
    for (int i = 0; i < 2; i++) {
        FILE *file = control();
        while (line_of(file, words[i], rest))
            if (sscanf(rest, "%255s %255s %lf", name, of, &figure) == 3 && !strcmp(name, function) &&
                (*of == '*' || atoi(of) == device)) {
                if (i) outcome = (ret)figure;
                else sleep_ms(figure);
            }
        if (file) fclose(file);
    }
    if (outcome != OK) return outcome;
    return inits > 0 ? OK : UNINITIALIZED;
}

#define BEGIN(device) do { ret early = begin(__func__, device); if (early) return early; } while (0)

static handle_t *of(void *device) { return (handle_t *)device; }
#define WHOLE(device) do { if (of(device)->instance >= 0) return NOT_SUPPORTED; } while (0)

ret nvmlInitWithFlags(u32 flags) {
    (void)flags;
    called(__func__, -1);
    double refused = setting("init", 0, 0);
    if (refused) return (ret)refused;
    for (u32 d = 0; d < DEVICES; d++) {
        whole[d] = (handle_t){d, -1};
        for (int i = 0; i < INSTANCES; i++) parts[d][i] = (handle_t){d, i};
    }
    pthread_mutex_lock(&lock);
    inits++;
    pthread_mutex_unlock(&lock);
    return OK;
}

ret nvmlShutdown(void) {
    BEGIN(-1);
    pthread_mutex_lock(&lock);
    inits--;
    pthread_mutex_unlock(&lock);
    return OK;
}

const char *nvmlErrorString(ret code) { (void)code; return "an error of the stand-in"; }

ret nvmlSystemGetDriverVersion(char *text, u32 length) {
    BEGIN(-1);
    snprintf(text, length, "999.99");
    return OK;
}

ret nvmlDeviceGetCount_v2(u32 *count) {
    BEGIN(-1);
    *count = (u32)setting("devices", 0, 1);
    return OK;
}

ret nvmlDeviceGetHandleByIndex_v2(u32 index, void **device) {
    BEGIN((int)index);
    if (index >= DEVICES) return INVALID;
    *device = &whole[index];
    return OK;
}

ret nvmlDeviceGetIndex(void *device, u32 *index) {
    BEGIN((int)of(device)->device);
    *index = of(device)->device;
    return OK;
}

ret nvmlDeviceGetName(void *device, char *text, u32 length) {
    BEGIN((int)of(device)->device);
    snprintf(text, length, "Stand-in H0%s", of(device)->instance < 0 ? "" : " MIG 1g");
    return OK;
}

ret nvmlDeviceGetUUID(void *device, char *text, u32 length) {
    BEGIN((int)of(device)->device);
    if (of(device)->instance < 0) snprintf(text, length, "GPU-%08u", of(device)->device);
    else snprintf(text, length, "MIG-%08u-%d", of(device)->device, of(device)->instance);
    return OK;
}

/* "mig DEVICE INSTANCES" */
ret nvmlDeviceGetMigMode(void *device, u32 *current, u32 *pending) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    *current = *pending = setting("mig", of(device)->device, 0) > 0;
    return OK;
}

ret nvmlDeviceGetMaxMigDeviceCount(void *device, u32 *count) {
    BEGIN((int)of(device)->device);
    *count = INSTANCES;
    return OK;
}

ret nvmlDeviceGetMigDeviceHandleByIndex(void *device, u32 index, void **instance) {
    BEGIN((int)of(device)->device);
    if (index >= setting("mig", of(device)->device, 0)) return NOT_FOUND;
    *instance = &parts[of(device)->device][index];
    return OK;
}

ret nvmlDeviceGetGpuInstanceId(void *device, u32 *id) {
    BEGIN((int)of(device)->device);
    if (of(device)->instance < 0) return NOT_SUPPORTED;
    *id = (u32)of(device)->instance + 7;
    return OK;
}

/* "memory DEVICE BYTES": in use; an instance has a tenth of each figure. */
static u64 in_use(void *device) {
    u64 used = (u64)setting("memory", of(device)->device, 2e9);
    return of(device)->instance < 0 ? used : used / 10;
}

ret nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    BEGIN((int)of(device)->device);
    u64 total = of(device)->instance < 0 ? 80000000000ull : 8000000000ull;
    *memory = (memory_t){total, total - in_use(device) - 500000000, in_use(device) + 500000000};
    return OK;
}

ret nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    BEGIN((int)of(device)->device);
    if (memory->version != (sizeof *memory | 2u << 24)) return 25;
    u64 total = of(device)->instance < 0 ? 80000000000ull : 8000000000ull;
    *memory = (memory_v2_t){memory->version, total, 500000000, total - in_use(device) - 500000000,
                            in_use(device)};
    return OK;
}

/* "utilization DEVICE PERCENT", "power DEVICE MILLIWATT", "clock DEVICE MHZ"; "idle DEVICE 1": the
 * driver has no samples. A buffer keeps the last KEPT periods of PERIOD_US. */
ret nvmlDeviceGetSamples(void *device, u32 kind, u64 since_us, u32 *type, u32 *count, sample_t *samples) {
    static const char *const words[] = {"power", "utilization", "memory_busy", "", "", "clock", "memory_clock"};
    static const double defaults[] = {300000, 50, 25, 0, 0, 1500, 2600};
    BEGIN((int)of(device)->device);
    WHOLE(device);
    if (kind > 6 || !*words[kind]) return INVALID;
    if (setting("idle", of(device)->device, 0)) return NOT_FOUND;
    u64 newest = now_us() / PERIOD_US, oldest = newest - KEPT + 1;
    if (since_us / PERIOD_US + 1 > oldest) oldest = since_us / PERIOD_US + 1;
    if (oldest > newest) return NOT_FOUND;
    *type = U32;
    if (!samples) {
        *count = (u32)(newest - oldest + 1);
        return OK;
    }
    u32 value = (u32)setting(words[kind], of(device)->device, defaults[kind]), filled = 0;
    for (u64 period = oldest; period <= newest && filled < *count; period++, filled++) {
        samples[filled].stamp = period * PERIOD_US;
        samples[filled].value.u = value;
    }
    *count = filled;
    return OK;
}

ret nvmlDeviceGetUtilizationRates(void *device, rates_t *rates) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    *rates = (rates_t){(u32)setting("utilization", of(device)->device, 50), 25};
    return OK;
}

/* "field ID DEVICE NUMBER" sets a field, "nofield ID DEVICE CODE" gives it an error; counters grow
 * with the seconds since 1970 by what a second is worth. */
ret nvmlDeviceGetFieldValues(void *device, int count, field_t *fields) {
    static const struct { u32 id; u32 type; double fixed, grows; } known[] = {
        {3, U64, 0, 0}, {4, U64, 0, 0}, {74, U64, 0, 0.25e9}, {76, U64, 0, 0}, {82, U32, 61, 0},
        {83, U64, 0, 300000}, {138, U64, 0, 1000}, {139, U64, 0, 2000}, {186, U32, 310000, 0},
        {197, U32, 0, 4000}, {198, U64, 0, 8000}, {269, U64, 0, 0}, {270, U64, 0, 0}, {271, U64, 0, 0}};
    BEGIN((int)of(device)->device);
    WHOLE(device);
    double since = now_us() / 1e6 - 1.7e9;
    for (int i = 0; i < count; i++) {
        char key[LINE];
        field_t *field = &fields[i];
        field->outcome = NOT_SUPPORTED;
        for (size_t k = 0; k < sizeof known / sizeof *known; k++)
            if (known[k].id == field->id) {
                snprintf(key, LINE, "field %u", field->id);
                double figure = setting(key, of(device)->device, known[k].fixed + since * known[k].grows);
                field->outcome = OK;
                field->type = known[k].type;
                if (field->type == U32) field->value.u = (u32)(u64)figure;
                else field->value.ull = (u64)figure;
            }
        if ((field->id == 138 || field->id == 139) && field->scope != 0xffffffffu) field->outcome = INVALID;
        snprintf(key, LINE, "nofield %u", field->id);
        field->outcome = (ret)setting(key, of(device)->device, field->outcome);
    }
    return OK;
}

/* "reasons DEVICE MASK" (decimal) */
ret nvmlDeviceGetCurrentClocksEventReasons(void *device, u64 *reasons) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    *reasons = (u64)setting("reasons", of(device)->device, 0);
    return OK;
}

ret nvmlDeviceGetCurrentClocksThrottleReasons(void *device, u64 *reasons) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    *reasons = (u64)setting("reasons", of(device)->device, 0);
    return OK;
}

ret nvmlDeviceGetTemperatureV(void *device, temperature_t *temperature) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    temperature->celsius = 55;
    return OK;
}

ret nvmlDeviceGetTemperature(void *device, u32 sensor, u32 *celsius) {
    (void)sensor;
    BEGIN((int)of(device)->device);
    WHOLE(device);
    *celsius = 54;
    return OK;
}

/* "process DEVICE PID BYTES PERCENT", as many lines as there are processes. */
static u32 processes(u32 device, process_t *list, process_util_t *shares, u32 room) {
    char rest[LINE];
    u32 on, pid, percent, found = 0;
    u64 used;
    FILE *file = control();
    while (line_of(file, "process", rest))
        if (sscanf(rest, "%u %u %llu %u", &on, &pid, &used, &percent) == 4 && on == device) {
            if (list && found < room) list[found] = (process_t){pid, used, ~0u, ~0u};
            if (shares && found < room) shares[found] = (process_util_t){pid, now_us(), percent, 1, 0, 0};
            found++;
        }
    if (file) fclose(file);
    return found;
}

static ret listed(void *device, u32 *count, process_t *list) {
    u32 room = *count;
    *count = processes(of(device)->device, list, NULL, room);
    return *count > room ? TOO_SMALL : OK;
}

ret nvmlDeviceGetComputeRunningProcesses_v3(void *device, u32 *count, process_t *list) {
    BEGIN((int)of(device)->device);
    return listed(device, count, list);
}

ret nvmlDeviceGetComputeRunningProcesses_v2(void *device, u32 *count, process_t *list) {
    BEGIN((int)of(device)->device);
    return listed(device, count, list);
}

ret nvmlDeviceGetProcessUtilization(void *device, process_util_t *shares, u32 *count, u64 since_us) {
    (void)since_us;
    BEGIN((int)of(device)->device);
    WHOLE(device);
    u32 room = *count;
    *count = processes(of(device)->device, NULL, shares, room);
    if (!*count) return NOT_FOUND;
    return *count > room ? TOO_SMALL : OK;
}

/* "gpm DEVICE 0": no such counters. Each counter reads its own number in percent or MiB/s. */
ret nvmlGpmQueryDeviceSupport(void *device, gpm_support_t *support) {
    BEGIN((int)of(device)->device);
    if (support->version != 1) return 25;
    support->supported = setting("gpm", of(device)->device, 1) != 0;
    return OK;
}

ret nvmlGpmSampleAlloc(gpm_sample_t **sample) {
    BEGIN(-1);
    *sample = calloc(1, sizeof **sample);
    return OK;
}

ret nvmlGpmSampleFree(gpm_sample_t *sample) {
    BEGIN(-1);
    free(sample);
    return OK;
}

ret nvmlGpmSampleGet(void *device, gpm_sample_t *sample) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    *sample = (gpm_sample_t){now_us(), of(device)->device, -1};
    return OK;
}

ret nvmlGpmMigSampleGet(void *device, u32 instance, gpm_sample_t *sample) {
    BEGIN((int)of(device)->device);
    WHOLE(device);
    if (instance < 7) return NOT_FOUND;
    *sample = (gpm_sample_t){now_us(), of(device)->device, (int)instance};
    return OK;
}

ret nvmlGpmMetricsGet(gpm_get_t *get) {
    BEGIN((int)get->before->device);
    if (get->version != 1) return 25;
    if (get->before->us > get->after->us || get->before->instance != get->after->instance) return INVALID;
    for (u32 i = 0; i < get->count; i++) {
        gpm_metric_t *metric = &get->metrics[i];
        metric->outcome = metric->id == 5 && setting("notensor", get->before->device, 0) ? NOT_SUPPORTED : OK;
        metric->value = metric->id;
    }
    return OK;
}

ret nvmlEventSetCreate(void **set) {
    BEGIN(-1);
    *set = calloc(DEVICES, sizeof(u64));
    return OK;
}

ret nvmlDeviceRegisterEvents(void *device, u64 kinds, u64 *set) {
    BEGIN((int)of(device)->device);
    if ((kinds & 2) && setting("noecc", of(device)->device, 0)) return NOT_SUPPORTED;
    set[of(device)->device] = kinds;
    return OK;
}

/* "event DEVICE TYPE DATA": each line is given once, in the order of the file. */
ret nvmlEventSetWait_v2(u64 *set, event_t *event, u32 timeout_ms) {
    BEGIN(-1);
    u64 until = now_us() + timeout_ms * 1000ull;
    do {
        char rest[LINE];
        u32 device;
        u64 type, data, seen = 0, wanted = events_given;
        FILE *file = control();
        while (line_of(file, "event", rest))
            if (seen++ == wanted && sscanf(rest, "%u %llu %llu", &device, &type, &data) == 3) {
                events_given++;
                if (device >= DEVICES || !(set[device] & type)) continue;
                *event = (event_t){&whole[device], type, data, ~0u, ~0u};
                fclose(file);
                return OK;
            }
        if (file) fclose(file);
        sleep_ms(10);
    } while (now_us() < until);
    return TIMED_OUT;
}

ret nvmlEventSetFree(void *set) {
    BEGIN(-1);
    free(set);
    return OK;
}
