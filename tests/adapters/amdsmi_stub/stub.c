/* A stand-in for libamd_smi.so: two GPUs whose values come from a file that is read at every question.
 *
 * AMDSMI_STUB_STATE names it. Each line is "GPU KEY VALUE": keys are total, used (bytes), busy (percent),
 * edge, hotspot (degrees Celsius), and fail.FUNCTION (the status to answer), slow.FUNCTION (milliseconds to wait).
 * Structures are laid out as the amdsmi Python package 7.0.2 has them.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 1, NOT_SUPPORTED = 2 };
enum { GPUS = 2 };

static int sockets[GPUS] = {0, 1};
static int gpus[GPUS] = {0, 1};

/* The value of a key, or `otherwise`. */
static long long value(int gpu, const char *key, long long otherwise) {
    const char *path = getenv("AMDSMI_STUB_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return otherwise;
    int line_gpu;
    char line_key[128];
    long long number, found = otherwise;
    while (fscanf(file, "%d %127s %lld", &line_gpu, line_key, &number) == 3)
        if (line_gpu == gpu && strcmp(line_key, key) == 0) found = number;
    fclose(file);
    return found;
}

static int fault(int gpu, const char *function) {
    char key[128];
    snprintf(key, sizeof key, "slow.%s", function);
    usleep((useconds_t)(value(gpu, key, 0) * 1000));
    snprintf(key, sizeof key, "fail.%s", function);
    return (int)value(gpu, key, SUCCESS);
}

#define GPU(handle) (*(int *)(handle))
#define MAYBE_FAIL(gpu) do { int bad = fault(gpu, __func__); if (bad) return bad; } while (0)

void amdsmi_free_name_value_pairs(void *pairs) { (void)pairs; }

int amdsmi_init(uint64_t flags) { (void)flags; MAYBE_FAIL(0); return SUCCESS; }

int amdsmi_shut_down(void) { return SUCCESS; }

int amdsmi_status_code_to_string(int status, const char **text) {
    (void)status;
    *text = "the stub's own error";
    return SUCCESS;
}

int amdsmi_get_socket_handles(uint32_t *count, void **handles) {
    if (handles) for (uint32_t i = 0; i < *count && i < GPUS; i++) handles[i] = &sockets[i];
    *count = GPUS;
    return SUCCESS;
}

int amdsmi_get_processor_handles(void *socket, uint32_t *count, void **handles) {
    if (handles && *count) handles[0] = &gpus[GPU(socket)];
    *count = 1;
    return SUCCESS;
}

int amdsmi_get_gpu_device_bdf(void *gpu, uint64_t *bdf) {
    uint64_t bus = GPU(gpu) == 0 ? 0x03 : 0xc3;
    *bdf = bus << 8; /* function 3 bits, device 5, bus 8, domain 48 */
    return SUCCESS;
}

struct asic_info {
    char market_name[256];
    uint32_t vendor_id;
    char vendor_name[256];
    uint32_t subvendor_id;
    uint64_t device_id;
    uint32_t rev_id;
    char asic_serial[256];
    uint32_t oam_id, compute_units, padding;
    uint64_t target_graphics_version;
    uint32_t subsystem_id, reserved[21];
} __attribute__((packed));

int amdsmi_get_gpu_asic_info(void *gpu, struct asic_info *info) {
    MAYBE_FAIL(GPU(gpu));
    memset(info, 0, sizeof *info);
    strcpy(info->market_name, GPU(gpu) == 0 ? "AMD Radeon RX 7900 XTX" : "AMD Instinct MI300X");
    strcpy(info->vendor_name, "Advanced Micro Devices Inc. [AMD/ATI]");
    strcpy(info->asic_serial, "1A2B");
    info->vendor_id = 0x1002;
    info->target_graphics_version = GPU(gpu) == 0 ? 0x1100 : 0x942;
    return SUCCESS;
}

struct driver_info { char version[256], date[256], name[256]; };

int amdsmi_get_gpu_driver_info(void *gpu, struct driver_info *info) {
    MAYBE_FAIL(GPU(gpu));
    memset(info, 0, sizeof *info);
    strcpy(info->version, "6.12.12");
    strcpy(info->name, "amdgpu");
    return SUCCESS;
}

int amdsmi_get_gpu_memory_total(void *gpu, int kind, uint64_t *bytes) {
    (void)kind;
    MAYBE_FAIL(GPU(gpu));
    *bytes = (uint64_t)value(GPU(gpu), "total", 24000000000LL);
    return SUCCESS;
}

int amdsmi_get_gpu_memory_usage(void *gpu, int kind, uint64_t *bytes) {
    (void)kind;
    MAYBE_FAIL(GPU(gpu));
    *bytes = (uint64_t)value(GPU(gpu), "used", 0);
    return SUCCESS;
}

struct vram_usage { uint32_t total_mib, used_mib, reserved[2]; };

int amdsmi_get_gpu_vram_usage(void *gpu, struct vram_usage *usage) {
    MAYBE_FAIL(GPU(gpu));
    usage->total_mib = (uint32_t)(value(GPU(gpu), "total", 24000000000LL) >> 20);
    usage->used_mib = (uint32_t)(value(GPU(gpu), "used", 0) >> 20);
    return SUCCESS;
}

struct engine_usage { uint32_t gfx, umc, mm, reserved[13]; };

int amdsmi_get_gpu_activity(void *gpu, struct engine_usage *usage) {
    MAYBE_FAIL(GPU(gpu));
    memset(usage, 0, sizeof *usage);
    usage->gfx = (uint32_t)value(GPU(gpu), "busy", 0);
    return SUCCESS;
}

int amdsmi_get_temp_metric(void *gpu, uint32_t sensor, int metric, int64_t *degrees) {
    MAYBE_FAIL(GPU(gpu));
    if (metric != 0) return INVALID;
    long long found = value(GPU(gpu), sensor == 0 ? "edge" : sensor == 1 ? "hotspot" : "vram", -1);
    if (found < 0) return NOT_SUPPORTED;
    *degrees = found;
    return SUCCESS;
}
