from services.reviewer.main import main

main()
