// The Safetensors core without Python: every rule by its fault, round trips, atomic saves.
#include <dirent.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <system_error>

#include "io/atomic_file.h"
#include "io/json_reader.h"
#include "io/safetensors.h"

namespace {

using namespace vt::io;
using Fault = SafetensorFault;

int failures = 0;

void check(bool ok, const char* what, int line) {
  if (ok) return;
  ++failures;
  std::printf("test_safetensors.cpp:%d: failed: %s\n", line, what);
}
#define CHECK(condition) check((condition), #condition, __LINE__)

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string file_with(const std::string& header, std::size_t data) {
  std::string out(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) out[i] = static_cast<char>((header.size() >> (8 * i)) & 0xff);
  return out + header + std::string(data, '\1');
}

std::string outcome(const std::string& file) {
  try {
    read_header(as_bytes(file));
    return "ok";
  } catch (const SafetensorError& error) {
    return fault_name(error.fault());
  }
}

void expect(const std::string& wanted, const std::string& header, std::size_t data, int line) {
  const std::string got = outcome(file_with(header, data));
  if (got != wanted)
    std::printf("  %s: wanted %s, got %s\n", header.c_str(), wanted.c_str(), got.c_str());
  check(got == wanted, "fault of a hostile header", line);
}
#define EXPECT(fault, header, data) expect(fault, header, data, __LINE__)

const std::string kOne = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";

void test_header_rules() {
  EXPECT("ok", "{}", 0);
  EXPECT("ok", "{" + kOne + "}   ", 8);
  EXPECT("ok", "{ \"a\" : {\"shape\":[],\t\"data_offsets\":[0,1],\"dtype\":\"BOOL\"} }", 1);
  EXPECT("ok", R"({"e":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]},)" + kOne + "}", 8);
  EXPECT("ok", R"({"__metadata__":{"k":"\u00e9\ud83d\ude00\n"}})", 0);
  EXPECT("ok", R"({"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1);
  CHECK(outcome("1234567") == "HeaderTooSmall");
  CHECK(outcome(std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10)) == "HeaderTooLarge");
  CHECK(outcome(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)) == "HeaderTooLarge");
  CHECK(outcome(std::string("\x03\0\0\0\0\0\0\0{}", 10)) == "InvalidHeaderLength");
  EXPECT("InvalidHeaderStart", "", 0);
  EXPECT("InvalidHeaderStart", " {}", 0);
  EXPECT("InvalidHeaderStart", "[]", 0);
  EXPECT("InvalidHeaderPadding", "{}\n", 0);
  EXPECT("InvalidHeaderPadding", "{} {}", 0);
  EXPECT("InvalidHeaderPadding", std::string("{}\0", 3), 0);
}

void test_json_rules() {
  for (const char* bad :
       {"{", "{\"a", "{\"a\"", "{\"a\":", "{\"a\":}", "{,}", "{\"a\":{},}", "{a:{}}", "{'a':{}}",
        R"({"\x":{}})", R"({"\u12":{}})", R"({"\ud800":{}})", R"({"\udc00":{}})",
        R"({"\ud800\u0041":{}})", "{\"\n\":{}}", "{\"a\":nul}",
        R"({"a":{"dtype":"F32","shape":[2,],"data_offsets":[0,8]}})",
        R"({"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}})"})
    EXPECT(
        "InvalidHeaderJson",
        *bad == '{' && std::strcmp(bad, "{\"a\":{},}") == 0 ? "{" + kOne + ",}" : std::string(bad),
        8);
  EXPECT("InvalidHeaderUtf8", "{\"\xff\":{}}", 0);
  EXPECT("InvalidHeaderUtf8", "{\"\xc0\xaf\":{}}", 0);          // overlong
  EXPECT("InvalidHeaderUtf8", "{\"\xed\xa0\x80\":{}}", 0);      // surrogate
  EXPECT("InvalidHeaderUtf8", "{\"\xf4\x90\x80\x80\":{}}", 0);  // above U+10FFFF
  EXPECT("InvalidHeaderUtf8", "{\"\xe2\x82", 0);
  EXPECT("DuplicateKey", "{" + kOne + "," + kOne + "}", 8);
  EXPECT("DuplicateKey",
         "{" + kOne + R"(,"\u0061":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})", 16);
  EXPECT("DuplicateKey", R"({"__metadata__":{"k":"1","k":"2"}})", 0);
  EXPECT("DuplicateKey", R"({"__metadata__":{},"__metadata__":{}})", 0);
  EXPECT("DuplicateKey", R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
         8);
}

void test_entry_rules() {
  for (const char* bad : {"[]", "\"x\"", "null", R"({"k":1})", R"({"k":null})", R"({"k":{}})"})
    EXPECT("InvalidMetadata", std::string(R"({"__metadata__":)") + bad + "}", 0);
  for (const char* bad :
       {"1", "[]", "null", "true", "{}", R"({"dtype":"F32","shape":[2]})",
        R"({"dtype":"F32","data_offsets":[0,8]})", R"({"shape":[2],"data_offsets":[0,8]})",
        R"({"dtype":1,"shape":[2],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[2e0],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":["2"],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[[2]],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]})",
        R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,9]})",
        R"({"dtype":"F32","shape":[2],"data_offsets":[8]})",
        R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1})"})
    EXPECT("InvalidTensorInfo", std::string(R"({"a":)") + bad + "}", 8);
  EXPECT("UnknownDtype", R"({"a":{"dtype":"F128","shape":[2],"data_offsets":[0,8]}})", 8);
  EXPECT("UnknownDtype", R"({"a":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}})", 8);
  EXPECT("InvalidTensorInfo", "{\"a\":" + std::string(1'000'000, '[') + "}", 0);  // no recursion
}

void test_layout_rules() {
  const auto info = [](const char* shape, const char* offsets, const char* dtype = "F32") {
    return std::string(R"({"dtype":")") + dtype + R"(","shape":[)" + shape +
           R"(],"data_offsets":[)" + offsets + "]}";
  };
  EXPECT("ShapeOverflow", "{\"a\":" + info("4611686018427387904,4", "0,8") + "}", 8);
  EXPECT("ShapeOverflow", "{\"a\":" + info("0,4611686018427387904,4", "0,0") + "}", 0);
  EXPECT("ShapeOverflow", "{\"a\":" + info("2305843009213693952", "0,8") + "}", 8);
  EXPECT("MisalignedSize", "{\"a\":" + info("3", "0,2", "F4") + "}", 2);
  EXPECT("SizeMismatch", "{\"a\":" + info("3", "0,8") + "}", 8);
  EXPECT("SizeMismatch", "{\"a\":" + info("2", "0,8", "F64") + "}", 8);
  EXPECT("InvalidOffsets", "{\"a\":" + info("2", "8,0") + "}", 8);
  EXPECT("InvalidOffsets", "{\"a\":" + info("2", "4,12") + "}", 12);
  EXPECT("DataHole", "{\"a\":" + info("2", "0,8") + ",\"b\":" + info("1", "12,16") + "}", 16);
  EXPECT("DataOverlap", "{\"a\":" + info("2", "0,8") + ",\"b\":" + info("2", "4,12") + "}", 12);
  EXPECT("DataOverlap", "{\"a\":" + info("2", "0,8") + ",\"b\":" + info("2", "0,8") + "}", 8);
  EXPECT("IncompleteBuffer", "{" + kOne + "}", 7);
  EXPECT("TrailingData", "{" + kOne + "}", 9);
  EXPECT("TrailingData", "{}", 1);
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

int files_in(const std::string& folder) {
  int count = 0;
  DIR* dir = ::opendir(folder.c_str());
  while (const dirent* entry = ::readdir(dir))
    count += entry->d_name[0] != '.' || entry->d_name[2] != 0;
  ::closedir(dir);
  return count - 1;  // ".." alone passes the filter
}

void test_write_and_read(const std::string& folder) {
  const std::string floats(8, '\2');
  const std::string longs(16, '\3');
  const std::vector<TensorBytes> tensors = {
      {"b", SafetensorDtype::F32, {2}, as_bytes(floats)},
      {"a", SafetensorDtype::F32, {1, 2}, as_bytes(floats)},
      {"z \"\\\n", SafetensorDtype::I64, {2}, as_bytes(longs)},
      {"empty", SafetensorDtype::BF16, {0, 4}, {}},
  };
  const std::string path = folder + "/model.safetensors";
  save_safetensors(path, tensors, Metadata{{"format", "vt"}});
  const std::string text = read_file(path);
  CHECK(text == serialize_safetensors(tensors, Metadata{{"format", "vt"}}));
  const MappedFile mapped(path);
  const SafetensorHeader header = read_header(mapped.bytes());
  CHECK(header.data_start % 8 == 0);
  CHECK(header.metadata && header.metadata->at(0).second == "vt");
  CHECK(header.tensors.size() == 4 && header.tensors[0].name == "z \"\\\n");
  CHECK(header.tensors[1].name == "a" && header.tensors[1].shape == std::vector<int64_t>({1, 2}));
  CHECK(header.tensors[1].begin == 16 && header.tensors[3].begin == 32);
  mapped.bytes()[header.data_start] = std::byte{9};  // copy-on-write: the file keeps its bytes
  CHECK(read_file(path) == text);
  CHECK(files_in(folder) == 1);
}

void test_refused_saves(const std::string& folder) {
  const std::string four(4, '\0');
  const auto fault_of = [&](std::vector<TensorBytes> tensors,
                            std::optional<Metadata> metadata = {}) {
    try {
      save_safetensors(folder + "/refused", std::move(tensors), metadata);
      return std::string("ok");
    } catch (const SafetensorError& error) {
      return std::string(fault_name(error.fault()));
    }
  };
  const auto bytes = as_bytes(four);
  CHECK(fault_of({{"a", SafetensorDtype::F32, {2}, bytes}}) == "SizeMismatch");
  CHECK(fault_of({{"a", SafetensorDtype::F32, {1}, bytes},
                  {"a", SafetensorDtype::F32, {1}, bytes}}) == "DuplicateKey");
  CHECK(fault_of({{"__metadata__", SafetensorDtype::F32, {1}, bytes}}) == "InvalidTensorInfo");
  CHECK(fault_of({{"\xff", SafetensorDtype::F32, {1}, bytes}}) == "InvalidHeaderUtf8");
  CHECK(fault_of({}, Metadata{{"k", "\xff"}}) == "InvalidMetadata");
  CHECK(files_in(folder) == 1);
}

/// A file size limit stands in for a full disk: write() fails half way through.
void test_failed_write_keeps_the_old_file(const std::string& folder) {
  const std::string path = folder + "/model.safetensors";
  const std::string before = read_file(path);
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {1 << 16, 1 << 16};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string big(1 << 20, '\5');
    try {
      save_safetensors(path, {{"big", SafetensorDtype::U8, {1 << 20}, as_bytes(big)}}, {});
    } catch (const std::system_error& error) {
      ::_exit(error.code().value() == EFBIG ? 0 : 2);
    }
    ::_exit(1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(read_file(path) == before);
  CHECK(files_in(folder) == 1);
}

char mutation(std::mt19937& random) {
  constexpr std::string_view likely = "{}[],:\"\\0189eu";
  return random() % 4 ? likely[random() % likely.size()] : static_cast<char>(random() & 0xff);
}

/// Whatever byte of a good file is changed or cut off: an error or a header, never a crash.
void test_mutations() {
  const std::string floats(8, '\2');
  const std::string good =
      serialize_safetensors({{"a", SafetensorDtype::F32, {2}, as_bytes(floats)},
                             {"b", SafetensorDtype::I8, {2, 4}, as_bytes(floats)}},
                            Metadata{{"k\t", "v"}});
  std::mt19937 random(1);
  for (int i = 0; i < 200'000; ++i) {
    std::string bad = good;
    for (auto n = random() % 3 + 1; n > 0; --n) bad[random() % bad.size()] = mutation(random);
    if (random() % 8 == 0) bad.resize(random() % bad.size());
    outcome(bad);
  }
  for (std::size_t size = 0; size < good.size(); ++size)
    CHECK(outcome(good.substr(0, size)) != "ok");
}

}  // namespace

int main() {
  std::string folder = "/tmp/vt_safetensors_XXXXXX";
  if (!::mkdtemp(folder.data())) return 2;
  test_header_rules();
  test_json_rules();
  test_entry_rules();
  test_layout_rules();
  test_write_and_read(folder);
  test_refused_saves(folder);
  test_failed_write_keeps_the_old_file(folder);
  test_mutations();
  ::unlink((folder + "/model.safetensors").c_str());
  CHECK(::rmdir(folder.c_str()) == 0);  // nothing was left behind
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
