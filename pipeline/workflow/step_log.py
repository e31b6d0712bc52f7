LOGS_FOLDER = "logs"
