import io.debezium.embedded.Connect;
import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.opentelemetry.api.trace.propagation.W3CTraceContextPropagator;
import io.opentelemetry.context.propagation.ContextPropagators;
import io.opentelemetry.sdk.OpenTelemetrySdk;
import java.io.Reader;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.kafka.connect.header.Header;
import org.apache.kafka.connect.source.SourceRecord;
import org.apache.kafka.connect.storage.Converter;
import org.apache.kafka.connect.storage.HeaderConverter;

/**
 * Runs a connector of Debezium's as Kafka Connect would, and says what would be written to Kafka: a
 * line for each record, with tabs between topic, key, value and headers ("name=value"). Key and
 * value are in hexadecimal, or "-" where there is none. Ends after so many records.
 *
 * <p>Arguments: a file with the connector's properties, and the number of records.
 */
public final class ReadOutbox {
    private static final HexFormat HEX = HexFormat.of();

    private final Converter keys;
    private final Converter values;
    private final HeaderConverter headers;
    private final CountDownLatch left;

    private ReadOutbox(Properties properties, int records) throws ReflectiveOperationException {
        keys = converter(properties, "key.converter", true);
        values = converter(properties, "value.converter", false);
        headers = create(HeaderConverter.class, "org.apache.kafka.connect.storage.SimpleHeaderConverter");
        headers.configure(Map.of());
        left = new CountDownLatch(records);
    }

    public static void main(String[] arguments) throws Exception {
        OpenTelemetrySdk.builder()
                .setPropagators(ContextPropagators.create(W3CTraceContextPropagator.getInstance()))
                .buildAndRegisterGlobal();
        Properties properties = new Properties();
        try (Reader file = Files.newBufferedReader(Path.of(arguments[0]))) {
            properties.load(file);
        }
        new ReadOutbox(properties, Integer.parseInt(arguments[1])).run(properties);
    }

    private void run(Properties properties) throws Exception {
        AtomicReference<Throwable> failure = new AtomicReference<>();
        DebeziumEngine<ChangeEvent<SourceRecord, SourceRecord>> engine = DebeziumEngine.create(Connect.class)
                .using(properties)
                .using((success, message, error) -> {
                    if (!success) {
                        failure.set(error != null ? error : new IllegalStateException(message));
                        while (left.getCount() > 0) {
                            left.countDown();
                        }
                    }
                })
                .notifying(this::print)
                .build();
        ExecutorService thread = Executors.newSingleThreadExecutor();
        thread.execute(engine);
        left.await();
        if (failure.get() == null) {
            engine.close();
        }
        thread.shutdown();
        if (failure.get() != null) {
            failure.get().printStackTrace();
            System.exit(1);
        }
    }

    private void print(ChangeEvent<SourceRecord, SourceRecord> event) {
        if (left.getCount() > 0) {
            System.out.println(line(event.value()));
            left.countDown();
        }
    }

    private String line(SourceRecord record) {
        String topic = record.topic();
        StringBuilder line = new StringBuilder(topic)
                .append('\t')
                .append(hex(keys.fromConnectData(topic, record.keySchema(), record.key())))
                .append('\t')
                .append(hex(values.fromConnectData(topic, record.valueSchema(), record.value())));
        for (Header header : record.headers()) {
            byte[] value = headers.fromConnectHeader(topic, header.key(), header.schema(), header.value());
            line.append('\t').append(header.key()).append('=');
            line.append(value == null ? "" : new String(value, StandardCharsets.UTF_8));
        }
        return line.toString();
    }

    private static String hex(byte[] bytes) {
        return bytes == null ? "-" : HEX.formatHex(bytes);
    }

    /** The converter that a worker of Kafka Connect would make of these properties. */
    private static Converter converter(Properties properties, String name, boolean isKey)
            throws ReflectiveOperationException {
        Map<String, String> own = new HashMap<>();
        for (String property : properties.stringPropertyNames()) {
            if (property.startsWith(name + ".")) {
                own.put(property.substring(name.length() + 1), properties.getProperty(property));
            }
        }
        Converter converter = create(Converter.class, properties.getProperty(name));
        converter.configure(own, isKey);
        return converter;
    }

    private static <T> T create(Class<T> type, String name) throws ReflectiveOperationException {
        return type.cast(Class.forName(name).getDeclaredConstructor().newInstance());
    }
}
