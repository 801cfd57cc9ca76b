/* The word count on Kafka Streams: split, repartition, count in RocksDB, changelog.
 *
 * Arguments: bootstrap servers, application id, topic of posts, words to count, guarantee,
 * state folder, partitions. Prints "seconds cpu_seconds", from the first post to the last word
 * counted, once all are counted and committed. Kafka Streams' own defaults but for two threads.
 */

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.sun.management.OperatingSystemMXBean;
import java.lang.management.ManagementFactory;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.KeyValue;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Repartitioned;
import org.apache.kafka.streams.state.KeyValueStore;

public class WordCount {
    static final OperatingSystemMXBean PROCESS =
            (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
    static final ObjectMapper JSON = new ObjectMapper();
    static final AtomicLong BEGAN_NS = new AtomicLong();
    static final AtomicLong BEGAN_CPU_NS = new AtomicLong();
    static final AtomicLong COUNTED = new AtomicLong();

    public static void main(String[] arguments) throws Exception {
        long words = Long.parseLong(arguments[3]);
        CountDownLatch done = new CountDownLatch(1);
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(arguments[2], Consumed.with(Serdes.String(), Serdes.String()))
                .flatMap((key, post) -> split(post))
                .repartition(Repartitioned.with(Serdes.String(), Serdes.String())
                        .withName("words")
                        .withNumberOfPartitions(Integer.parseInt(arguments[6])))
                .peek((key, word) -> {
                    if (COUNTED.incrementAndGet() == words) {
                        done.countDown();
                    }
                })
                .groupByKey(Grouped.with(Serdes.String(), Serdes.String()))
                .count(Materialized.<String, Long, KeyValueStore<Bytes, byte[]>>as("counts")
                        .withKeySerde(Serdes.String())
                        .withValueSerde(Serdes.Long()));
        Properties settings = new Properties();
        settings.put("bootstrap.servers", arguments[0]);
        settings.put("application.id", arguments[1]);
        settings.put("processing.guarantee", arguments[4]);
        settings.put("state.dir", arguments[5]);
        settings.put("num.stream.threads", "2");
        settings.put("consumer.auto.offset.reset", "earliest");
        settings.put("producer.compression.type", "lz4");
        KafkaStreams streams = new KafkaStreams(builder.build(), settings);
        streams.start();
        done.await();
        double seconds = (System.nanoTime() - BEGAN_NS.get()) / 1e9;
        double cpu = (PROCESS.getProcessCpuTime() - BEGAN_CPU_NS.get()) / 1e9;
        if (!streams.close(Duration.ofSeconds(60))) {
            throw new IllegalStateException("Kafka Streams did not close in 60 s");
        }
        System.out.println(seconds + " " + cpu);
    }

    static List<KeyValue<String, String>> split(String post) {
        if (BEGAN_NS.compareAndSet(0, System.nanoTime())) {
            BEGAN_CPU_NS.set(PROCESS.getProcessCpuTime());
        }
        List<KeyValue<String, String>> words = new ArrayList<>();
        try {
            for (String word : JSON.readValue(post, String.class).split(" ")) {
                words.add(KeyValue.pair(word, word));
            }
        } catch (JsonProcessingException error) {
            throw new IllegalArgumentException(error);
        }
        return words;
    }
}
